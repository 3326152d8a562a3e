"""A run that goes on: with more builds, with fewer, after it was met, at the ends of the search."""

import json
from dataclasses import replace

import onnx
import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.errors import ConfigError, PlanError
from prune2deploy.plan.allocate import SmallestMisses
from prune2deploy.plan.choices import allowed, choices, importance_curves
from prune2deploy.rundir import read_manifest
from prune2deploy.search import planning
from prune2deploy.search.cycle import Search

from ..formula import formula_profile

X = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def chain(*widths):
    torch.manual_seed(0)
    layers, before = [], 3
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        before = width
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, 8)
    return nn.Sequential(*layers, *end).eval()


@pytest.fixture
def start(tmp_path):
    def begin(net, name="r", step=8, **more):
        path = tmp_path / f"formula{step}.toml"
        path.write_text(formula_profile(step=step, fixed_ns=2000.0))
        return prune2deploy.prune_to_budget(
            net, X, target=path, run_dir=tmp_path / name, cache=False, **more
        )

    return begin


def check_agreement(result):
    """Every artefact is of the model that the manifest tells of."""
    final = read_manifest(result.run_dir)["final"]
    file = result.run_dir / "model.onnx"
    assert file.stat().st_size == final["bytes"] == result.report.final.bytes
    weights = torch.load(result.run_dir / "weights.pt", weights_only=True)
    assert {n: tuple(t.shape) for n, t in weights.items()} == {
        n: tuple(t.shape) for n, t in result.module.state_dict().items()
    }
    assert sum(p.numel() for p in result.module.parameters()) == final["params"]
    given = onnx.load(str(file)).graph.initializer
    assert {tuple(t.dims) for t in given if len(t.dims) == 4} == {
        tuple(p.shape) for p in result.module.parameters() if p.ndim == 4
    }
    x = torch.randn(1, 3, 12, 12)
    loaded = torch.export.load(str(result.run_dir / "model.pt2")).module()
    torch.testing.assert_close(loaded(x), result.module(x))


def built(result):
    journal = (result.run_dir / "journal.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in journal]
    return [key for key in keys if key.endswith("/build") and not key.startswith("00-")]


def test_a_run_that_goes_on_tells_of_its_earlier_final_build(start):
    given = {"speedup": 2.4, "batches": [((torch.randn(8, 3, 12, 12),), None)]}
    first = start(chain(64, 96, 64), max_builds=2, **given)
    second = start(chain(64, 96, 64), max_builds=8, resume=True, **given)
    assert (first.report.steps[-1].number, first.report.steps[-1].step) == (2, "final")
    assert second.report.builds == len(built(second)) == len(second.report.steps)
    assert first.report.steps[-1].params in {
        step.params for step in second.report.steps[:-1] if step.step == "final"
    }
    numbers = [step.number for step in second.report.steps]
    assert numbers == sorted(numbers)


@pytest.mark.parametrize("most", [7, 8])
def test_a_search_goes_on_where_the_recovered_model_is_too_slow(start, monkeypatch, most):
    real, doubted = Search.measure, []

    def measure(self, made, predicted_ms):
        found = real(self, made, predicted_ms)
        if made.step == "final" and (not doubted or doubted[0] == made.number):
            doubted.append(made.number)
            return replace(found, verdict="uncertain")
        return found

    monkeypatch.setattr(Search, "measure", measure)
    given = {"speedup": 1.6, "batches": [((torch.randn(8, 3, 12, 12),), None)]}
    result = start(chain(64, 96, 64), max_builds=most, **given)
    steps = [line.step for line in result.report.steps]
    finals = [line for line in result.report.steps if line.step == "final"]
    assert result.met and len(finals) == 2 and steps[-1] == "final"
    assert result.report.builds == len(steps) <= most and finals[0].macs != finals[1].macs
    check_agreement(result)
    again = start(chain(64, 96, 64), max_builds=most, resume=True, **given)
    assert again.plan == result.plan and built(again) == built(result)


def test_a_run_may_be_moved(start, tmp_path):
    first = start(chain(64, 96), speedup=1.5)
    assert str(tmp_path) not in (first.run_dir / "journal.jsonl").read_text()
    first.run_dir.rename(tmp_path / "elsewhere")
    again = start(chain(64, 96), "elsewhere", speedup=1.5, resume=True)
    check_agreement(again)
    assert again.plan == first.plan and again.measurement == first.measurement


@pytest.mark.parametrize("data", [False, True])
def test_fewer_builds_than_before_change_nothing(start, data):
    net, least = chain(64, 96, 64), 2 if data else 1
    given = {"speedup": 2.4}
    if data:
        given["batches"] = [((torch.randn(8, 3, 12, 12),), None)]
    few = start(net, max_builds=least, **given)
    check_agreement(few)
    more = start(net, max_builds=8, resume=True, **given)
    assert more.met
    check_agreement(more)
    again = start(net, max_builds=least, resume=True, **given)
    check_agreement(again)
    assert again.met and again.plan == more.plan
    assert again.measurement.ratio == more.measurement.ratio
    assert any("came too late" in note for note in again.report.notes)


def test_what_was_built_is_used_when_more_builds_are_allowed(start):
    net = chain(64, 96, 64)
    first = start(net, speedup=2.8, max_builds=3)
    assert any("all 3 builds are used" in note for note in first.report.notes)
    assert (first.run_dir / "builds").is_dir()  # the note invites to go on
    before = built(first)
    second = start(net, speedup=2.8, max_builds=8, resume=True)
    check_agreement(second)
    assert built(second)[: len(before)] == before
    assert second.report.builds == len(built(second))
    assert (
        max(m.ratio for m in second.measurements if m.ratio <= 1 / 2.8) >= first.measurement.ratio
    )


def test_a_run_that_is_over_is_the_same_with_more_builds(start):
    net = chain(64, 96, 64)
    first = start(net, speedup=1.5)
    assert first.met and not (first.run_dir / "builds").exists()
    again = start(net, speedup=1.5, max_builds=20, resume=True)
    check_agreement(again)
    assert built(again) == built(first) and again.plan == first.plan


@pytest.mark.parametrize("speedup", [1.9, 2.0, 2.2])
def test_the_smallest_plan_that_misses_is_a_floor_whichever_way_it_was_found(start, speedup):
    """The device has steps of 32 and the profile says 8: plans look faster than they are."""
    result = start(chain(64), step=32, speedup=speedup)
    if result.plan.counts == {"0": 8} and not result.met:
        assert result.verdict == "unreachable"
        assert "the smallest plan measured" in result.report.verdict


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(32, 32, 3, padding=1), nn.Conv2d(32, 32, 1)

    def forward(self, x):
        return (x + self.up(self.down(x).relu())).relu()


def shortcuts():
    torch.manual_seed(0)
    blocks = [Block() for _ in range(3)]
    end = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 8)
    return nn.Sequential(nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), *blocks, *end).eval()


def test_blocks_go_where_the_smallest_widths_miss_unless_layers_are_bounded(start):
    net = shortcuts()
    gone = start(net, "gone", step=32, speedup=1.9, keep=["0"])
    assert gone.met and gone.plan.removed
    bounded = start(net, "bounded", step=32, speedup=1.9, max_pruning_ratio=0.5, max_builds=4)
    assert bounded.report.builds == 4
    assert not any("max_builds" in note for note in bounded.report.notes)
    assert bounded.verdict == "unreachable" and not bounded.plan.removed
    assert any("because of max_pruning_ratio 0.5" in note for note in bounded.report.notes)
    assert not (bounded.run_dir / "builds").exists()  # no more builds would help


def test_blocks_go_too_where_the_smallest_plan_was_tried_before(start, monkeypatch):
    """Where predictions are bent, the fastest plan is none of the narrowest widths."""
    real, tried = planning.allocate, []

    def bent(problem):
        if not tried:
            ample = replace(problem, budget_ms=0.97 * problem.model.predict({}))
            tried.append((len(problem.choices), real(ample)))
            return tried[0][1]
        many, plan = tried[0]
        if len(problem.choices) < many:
            return real(problem)
        found = SmallestMisses.__new__(SmallestMisses)
        found.counts, found.floor_ms = plan.counts, plan.predicted_ms
        raise found

    monkeypatch.setattr(planning, "allocate", bent)
    result = start(shortcuts(), speedup=1.9)
    assert result.plan.removed and result.met


@pytest.mark.parametrize("speedup", [1.05, 1.9])
def test_blocks_go_where_widths_alone_cannot_keep_a_cap(start, speedup):
    net = shortcuts()
    narrowest = start(net, "free", step=32, speedup=50.0, keep=["0"])
    assert narrowest.verdict == "unreachable" and len(narrowest.plan.removed) == 3
    least = narrowest.report.final.macs
    result = start(net, "capped", step=32, speedup=speedup, keep=["0"], max_macs=4 * least)
    assert result.met and result.report.final.macs <= 4 * least and result.plan.removed
    assert any(f"within max_macs {4 * least}" in note for note in result.report.notes)
    with pytest.raises(PlanError, match="a cap of"):
        start(net, "beyond", step=32, speedup=speedup, keep=["0"], max_macs=least // 2)


@pytest.mark.parametrize("cap", [{"max_size_mb": 0.0075}, {"max_size_mb": 0.006}])
def test_a_cap_that_can_be_kept_is_kept_with_data_too(start, cap):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 64, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8),
    ).eval()  # fmt: skip
    data = [((torch.randn(8, 3, 12, 12),), None)]
    plain, fitted = (
        start(net, name, speedup=1.05, batches=batches, **cap)
        for name, batches in (("plain", None), ("fitted", data))
    )
    assert plain.met and fitted.met
    assert 4 * fitted.report.final.params <= 1e6 * cap["max_size_mb"]


def test_a_bound_that_leaves_every_layer_as_it_is_is_named_before_anything_but_the_baseline(start):
    with pytest.raises(ConfigError, match=r"max_pruning_ratio 0.05: .* multiples of 8"):
        start(chain(64, 96, 64), speedup=1.3, max_pruning_ratio=0.05)


@pytest.mark.parametrize(("ratio", "size", "step", "least"), [(0.7, 320, 8, 96), (0.7, 10, 1, 3)])
def test_a_bound_is_exact(ratio, size, step, least):
    net = nn.Sequential(nn.Conv2d(3, size, 1), nn.Conv2d(size, 2, 1)).eval()
    graph = prune2deploy.trace(net, X)
    scores = {axis.name: torch.rand(axis.size).numpy() for axis in graph.prunable}
    curves = importance_curves(graph, scores)
    (choice,) = choices(graph, curves, multiple=step, least=1 - ratio)
    assert choice.options[0] == least == allowed(size, step, least, 100)[0]


def test_outputs_of_zeros_are_told_since_their_agreement_shows_little(start):
    net = chain(64, 96)
    assert not any("parity" in note for note in start(net, "a", speedup=1.3).report.notes)
    nn.init.zeros_(net[-1].weight)
    nn.init.zeros_(net[-1].bias)
    told = start(net, "b", speedup=1.3).report.notes
    assert "parity shows little of output 'output': all its values are 0 or infinite" in told
