"""Widths are worth what data says; without data no axis is starved."""

import itertools
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.graph import trace
from prune2deploy.importance import score
from prune2deploy.journal import Journal
from prune2deploy.plan.allocate import allocate
from prune2deploy.plan.choices import Problem, choices, importance_curves, trained_curves
from prune2deploy.plan.latency_model import Build, fit
from prune2deploy.plan.plan import Plan
from prune2deploy.search import recall, worth
from prune2deploy.search.worth import Loss, blended

from ..formula import formula_profile


class Branches(nn.Module):
    """Two equal branches; the head takes what the first says and a thousandth of the second."""

    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(3, 64, 3), nn.BatchNorm2d(64), nn.ReLU())
        self.first, self.second = nn.Conv2d(64, 8, 3), nn.Conv2d(64, 8, 3)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.second.weight.mul_(100)  # large weights, as norms see it
            self.scale = 1e-5

    def forward(self, x):
        made = self.first(self.one(x)) + self.scale * self.second(self.two(x))
        return self.head(made.relu().mean((2, 3)))


class Squared(Branches):
    """The same layers under another forward pass."""

    def forward(self, x):
        return super().forward(x) ** 2


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile())
    return path


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [((torch.randn(16, 3, 12, 12),), None) for _ in range(3)]


def run(target, folder, batches, kind=Branches, **more):
    torch.manual_seed(0)
    more = {"speedup": 1.6, "probes": 3, **more}
    more.pop("probes")
    example = torch.randn(1, 3, 12, 12)
    return prune2deploy.prune_to_budget(
        kind().eval(), example, target=target, run_dir=folder, batches=batches, **more
    )


def test_data_finds_the_branch_that_does_not_matter(target, tmp_path, batches):
    result = run(target, tmp_path / "r", batches)
    counts = {"one.0": 64, "two.0": 64, **result.plan.counts}
    assert result.met
    assert counts["two.0"] <= 16 and counts["one.0"] >= 32
    assert "sensitivity measured on 48 samples" in " ".join(result.report.notes)


def test_training_to_follow_balances_the_widths(target, tmp_path, batches):
    """The branch that does not matter now is cut less hard where training may bring it back."""
    plain = run(target, tmp_path / "a", batches, speedup=1.3)
    trained = run(target, tmp_path / "b", batches, speedup=1.3, finetune=lambda module: None)
    assert trained.met
    kept = [{"one.0": 64, "two.0": 64, **r.plan.counts}["two.0"] for r in (plain, trained)]
    assert kept[1] > kept[0]
    told = " ".join(trained.report.notes)
    assert "in balance by scores, because training follows" in told and "compared" not in told


def test_measured_and_data_free_worth_span_as_much_at_weight_one():
    rng = np.random.default_rng(0)
    rises = {n: -np.sort(rng.random(9))[::-1] * (np.arange(9) < 8) for n in "ab"}
    free = {n: np.linspace(0, 0.5, 9) for n in "ab"}
    span = sum(-curve.min() for curve in rises.values())
    added = {n: blended(rises, free, 1.0)[n] - rises[n] for n in "ab"}
    assert sum(curve[-1] - curve[0] for curve in added.values()) == pytest.approx(span)
    nothing = {n: np.zeros(9) for n in "ab"}  # a model that loses nothing still has an order
    assert (np.diff(blended(nothing, free, 0.01)["a"]) > 0).all()


def test_losses_are_not_measured_again(target, tmp_path, batches, monkeypatch):
    monkeypatch.setenv(recall.PLACE, str(tmp_path / "cache"))
    calls = []
    real = Loss.__call__

    def lost(self, counts):
        calls.append(counts)
        return real(self, counts)

    monkeypatch.setattr(Loss, "__call__", lost)
    seen = []

    def stop(step):
        seen.append(step)
        if sum(s.stage == "measuring sensitivity" for s in seen) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(target, tmp_path / "a", batches, progress=stop)
    first = len(calls)
    run(target, tmp_path / "a", batches, resume=True)
    second = len(calls) - first
    lines = (tmp_path / "a/journal.jsonl").read_text().splitlines()
    keys = [json.loads(line)["key"] for line in lines]
    assert len(keys) == len(set(keys))
    calls.clear()
    run(target, tmp_path / "b", batches, speedup=2.0)
    assert not calls
    (held,) = (tmp_path / "cache/sensitivity").iterdir()
    held.write_text("{broken")
    run(target, tmp_path / "c", batches, speedup=2.0)
    assert second < len(calls) and json.loads(held.read_text())["samples"] == 48
    calls.clear()
    run(target, tmp_path / "e", batches, speedup=2.0, kind=Squared)
    assert calls  # other code under the same weights
    calls.clear()
    run(target, tmp_path / "d", [((b[0] + 1,), None) for b, _ in batches], speedup=2.0)
    assert calls  # other data


def test_labels_are_used_where_they_fit(batches, tmp_path, target):
    labelled = [(inputs, torch.arange(16) % 4) for inputs, _ in batches]
    misfit = [(inputs, torch.arange(16)) for inputs, _ in batches]
    for given, name in ((labelled, "a"), (misfit, "b")):
        result = run(target, tmp_path / name, given)
        assert result.met
        assert (result.report.accuracy is None) == (given is misfit)
    fit = run(target, tmp_path / "a", labelled, resume=True)
    with torch.no_grad():
        right = [(fit.module.eval()(*x).argmax(1) == y).float().mean().item() for x, y in labelled]
    assert fit.report.accuracy.samples == 48
    assert fit.report.accuracy.final == pytest.approx(sum(right) / 3)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, dtype=torch.int32)])
def test_losses_take_no_labels_that_are_no_classes(labels):
    found, wanted = [torch.full((4, 1), 2.0)], [torch.ones(4, 1)]
    assert worth._loss(found, wanted, labels) == 1.0


def curves_of(widths):
    model = nn.Sequential(*(nn.Conv2d(a, b, 1) for a, b in itertools.pairwise(widths)))
    graph = trace(model, torch.randn(1, widths[0], 4, 4))
    return graph, importance_curves(graph, score("l2", model, graph))


def test_curves_rise_flatten_and_add_up_to_one():
    graph, curves = curves_of((3, 16, 64, 8, 5))
    assert sum(curve[-1] for curve in curves.values()) == pytest.approx(1)
    for axis in graph.prunable:
        steps = np.diff(curves[axis.name])
        assert curves[axis.name][0] == 0
        assert (steps > 0).all() and (np.diff(steps) < 1e-12).all()
    zero = importance_curves(graph, {axis.name: np.zeros(axis.size) for axis in graph.prunable})
    assert all((np.diff(curve) > 0).all() for curve in zero.values())


def test_scale_of_an_axis_does_not_matter():
    graph, curves = curves_of((3, 16, 16, 5))
    rng = np.random.default_rng(0)
    scores = {axis.name: rng.random(axis.size) for axis in graph.prunable}
    tiny = {**scores, graph.prunable[0].name: 1e-6 * scores[graph.prunable[0].name]}
    one, other = importance_curves(graph, scores), importance_curves(graph, tiny)
    assert all(np.allclose(one[name], other[name]) for name in curves)


@pytest.mark.parametrize("speedup", [1.5, 2.0, 3.0])
def test_no_axis_of_resnet18_is_starved_while_others_are_whole(speedup):
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    model = models.resnet18().eval()
    graph = trace(model, torch.randn(1, 3, 64, 64))
    curves = importance_curves(graph, score("l2", model, graph))
    latency = fit(graph, [Build({}, (), 10.0)])
    problem = Problem(graph, latency, choices(graph, curves, multiple=16), 10.0 / speedup)
    counts = allocate(problem).counts
    shares = [counts[axis.name] / axis.size for axis in graph.prunable]
    assert min(shares) >= 0.25
    assert latency.predict(counts) >= 0.95 * problem.budget_ms


def test_worth_where_training_follows_spares_bottlenecks():
    """Each halving costs about twice the one before; no axis is worth more than another."""
    graph, _ = curves_of([3, 64, 64, 4])
    even = {axis.name: np.ones(axis.size) for axis in graph.prunable}
    found = trained_curves(graph, even)
    assert sum(curve[-1] for curve in found.values()) == pytest.approx(1)
    for axis in graph.prunable:
        curve = found[axis.name]
        assert curve[0] == 0 and curve[-1] == pytest.approx(1 / len(graph.prunable))
        halvings = -np.diff(curve[[64, 32, 16, 8]])
        assert (halvings[1:] / halvings[:-1] > 1.6).all()
        assert (halvings[1:] / halvings[:-1] < 2).all()


def test_channels_that_nothing_needs_are_worth_nothing_where_training_follows():
    graph, _ = curves_of([3, 64, 64, 4])
    first = graph.prunable[0].name
    scores = {axis.name: np.ones(axis.size) for axis in graph.prunable}
    scores[first] = np.where(np.arange(64) < 16, 1.0, 0.0)
    curve = trained_curves(graph, scores)[first]
    assert curve[16] == pytest.approx(curve[64]) and curve[15] < curve[16]


class Twice(nn.Module):
    """Two residual blocks behind a stem."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.one, self.two = Residual(), Residual()

    def forward(self, x):
        return self.head(self.two(self.one(self.stem(x))))


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.up(self.down(x).relu())


class Softmax(Twice):
    """Overflows to not a number unless the first block undoes what the stem makes."""

    def __init__(self):
        super().__init__()
        with torch.no_grad():
            self.stem.weight.mul_(0).add_(1e4)
            self.one.down.weight.copy_(torch.eye(16)[..., None, None])
            self.one.up.weight.copy_(-torch.eye(16)[..., None, None])

    def forward(self, x):
        made = super().forward(x.abs()).mean((2, 3)).abs().exp()
        return made / made.sum(1, keepdim=True)


@pytest.mark.parametrize("labels", [torch.arange(8) % 4, None])
def test_a_block_without_which_nothing_is_a_number_is_the_last_to_go(tmp_path, labels):
    torch.manual_seed(0)
    model, x = Softmax().eval(), torch.randn(1, 3, 4, 4)
    graph, journal = trace(model, x), Journal(tmp_path / "journal.jsonl")
    shop = SimpleNamespace(
        module=model,
        graph=graph,
        example_inputs=(x,),
        run=SimpleNamespace(journal=journal),
        batches=[((torch.randn(8, 3, 4, 4),), labels)],
        say=lambda *_: None,
    )
    lost = worth.of_blocks(shop, {}, worth.Worth({}, "", samples=8, data=True), 4)
    assert lost["one"] == np.inf and 0 <= lost["two"] < np.inf


class Shuffled:
    """Other values each time, as data gives that is shuffled or augmented."""

    def __init__(self):
        self.times = 0

    def __iter__(self):
        self.times += 1
        torch.manual_seed(self.times)
        yield (torch.randn(8, 3, 4, 4),), None


def test_a_plan_keeps_its_loss_when_a_run_goes_on_with_data_in_another_order(tmp_path):
    model, x, data = Twice().eval(), torch.randn(1, 3, 4, 4), Shuffled()
    graph, plans = trace(model, x), [Plan({}, removed=(name,)) for name in ("one", "two")]

    def losses():
        shop = SimpleNamespace(
            module=model,
            graph=graph,
            example_inputs=(x,),
            run=SimpleNamespace(journal=Journal(tmp_path / "journal.jsonl")),
            batches=data,
            say=lambda *_: None,
        )
        rank = worth.ranking(shop, {}, worth.Worth({}, "", samples=8, data=True))
        return [rank(plan, 4) for plan in plans]

    first = losses()
    assert first[0] != first[1] and losses() == first


def test_what_is_lost_with_a_block_beside_the_worth_of_its_axes(tmp_path):
    graph = trace(Twice().eval(), torch.randn(1, 3, 4, 4))
    journal = Journal(tmp_path / "journal.jsonl")
    journal.write("sensitivity of blocks", {"one": 1.0, "two": 3.0})
    shop = SimpleNamespace(graph=graph, run=SimpleNamespace(journal=journal))
    curves = trained_curves(graph, {a.name: np.ones(a.size) for a in graph.prunable})

    def lost(**facts):
        return worth.of_blocks(shop, {}, worth.Worth(curves, "", **facts), 4)

    assert lost() == {"one": 0.0, "two": 0.0}
    assert lost(samples=4, data=True) == {"one": 1.0, "two": 3.0}
    inner = curves["one.down"][-1] + curves["two.down"][-1]
    assert lost(data=True) == {"one": pytest.approx(inner / 4), "two": pytest.approx(3 * inner / 4)}
