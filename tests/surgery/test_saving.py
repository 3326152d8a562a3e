"""A pruned model comes back with its code (plan and weights) and without it (an archive)."""

import pickle

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.errors import ConfigError, ModelError, PlanError
from prune2deploy.graph import trace
from prune2deploy.models import load
from prune2deploy.plan.plan import Plan
from prune2deploy.rundir import RunDir
from prune2deploy.search import candidate
from prune2deploy.surgery.slicing import apply

from .test_slicing import Embedded

X = torch.randn(1, 4, 5)


def plain():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3))


MODELS = {"as its code runs": plain, "captured": Embedded}


@pytest.fixture(params=MODELS)
def saved(request, tmp_path):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    graph = trace(model, X)
    plan = Plan({a.name: tuple(range(1, a.size, 2)) for a in graph.prunable})
    pruned = apply(model, graph, plan)
    with RunDir(tmp_path / "run", {"model": request.param}, resume=False) as run:
        assert candidate.save_module(run, pruned, (X,)) == ""
        run.write_text("plan.json", plan.to_json())
    return MODELS[request.param], pruned.eval(), tmp_path / "run"


def test_with_its_code_from_plan_and_weights(saved):
    build, pruned, folder = saved
    torch.manual_seed(1)  # other weights than those that were pruned
    loaded = prune2deploy.load_pruned(build(), X, folder)
    assert torch.equal(loaded(X), pruned(X))
    assert loaded.state_dict().keys() == pruned.state_dict().keys()
    loaded(torch.randn(3, 4, 5)).sum().backward()


def test_without_its_code_from_an_archive(saved):
    _, pruned, folder = saved
    loaded = load(str(folder / "model.pt2"))
    torch.testing.assert_close(loaded.module(X), pruned(X))


def test_what_belongs_to_another_model_is_refused(saved):
    build, _, folder = saved
    other = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(PlanError):
        prune2deploy.load_pruned(other, X, folder)
    torch.save(other.state_dict(), folder / "weights.pt")
    with pytest.raises(ModelError):
        prune2deploy.load_pruned(build(), X, folder)
    (folder / "plan.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(PlanError, match="not a plan"):
        prune2deploy.load_pruned(build(), X, folder)
    (folder / "plan.json").unlink()
    with pytest.raises(ConfigError, match=r"plan\.json"):
        prune2deploy.load_pruned(build(), X, folder)


class Bomb:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_no_code_in_the_weights_is_run(saved):
    build, _, folder = saved
    (folder / "weights.pt").write_bytes(pickle.dumps({"0.weight": Bomb()}))
    with pytest.raises(ModelError):
        prune2deploy.load_pruned(build(), X, folder)
