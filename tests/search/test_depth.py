"""Where the narrowest widths miss the budget, blocks go; and only then."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.graph import trace
from prune2deploy.journal import Journal
from prune2deploy.plan.allocate import allocate
from prune2deploy.plan.choices import Problem, choices, importance_curves
from prune2deploy.plan.latency_model import Build, fit
from prune2deploy.plan.plan import Plan
from prune2deploy.rundir import read_manifest
from prune2deploy.search import depth
from prune2deploy.surgery.slicing import apply

from ..formula import formula_profile


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 1)

    def forward(self, x):
        return x + self.up(self.down(x).relu())


class Deep(nn.Module):
    """A stem, six blocks (one of them costly) and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.blocks = nn.ModuleList(Block(32, n) for n in (32, 32, 96, 32, 32, 32))
        self.head = nn.Linear(32, 4)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Deep().eval(), torch.randn(1, 3, 8, 8)


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile(fixed_ns=4000.0))
    return path


def run(net, target, folder, **more):
    return prune2deploy.prune_to_budget(*net, target=target, run_dir=folder, **more)


@pytest.fixture(scope="module")
def floor(net, tmp_path_factory):
    """Measured latency of the unpruned net and of its narrowest widths, and of no blocks at all."""
    folder = tmp_path_factory.mktemp("floor")
    path = folder / "formula.toml"
    path.write_text(formula_profile(fixed_ns=4000.0))
    result = run(net, path, folder / "r", budget_ms=1e-6)
    steps = [line for line in result.report.steps if line.step == "correction"]
    return result, result.report.baseline.p50_ms, steps[0].measured_ms, steps[-1].measured_ms


def test_out_of_reach_means_without_any_block(net, floor):
    result, whole, widths, least = floor
    manifest = read_manifest(result.run_dir)
    names = {block.name for block in trace(*net).blocks}
    assert result.verdict == "unreachable" and set(result.plan.removed) == names
    assert manifest["floor_ms"] == manifest["final"]["p50_ms"] == least < widths < whole
    assert set(manifest["removed"]) == names
    # nothing smaller exists: stem and head at 8 channels, by hand
    nodes = result.report.layers
    assert len([n for n in nodes if n.after_ms is not None]) == 3  # stem, mean, head
    assert result.module(net[1]).shape == (1, 4)


@pytest.mark.parametrize("share", [0.5, 0.8])
def test_blocks_go_where_widths_do_not_reach(net, target, tmp_path, floor, share):
    _, _, widths, least = floor
    budget = least + share * (widths - least)
    result = run(net, target, tmp_path / "r", budget_ms=budget)
    assert result.met and 0 < len(result.plan.removed) < 6
    steps = result.report.steps
    first = [line.step for line in steps].index("correction")
    after = steps[first + 1 :]  # the one before has shown that widths alone do not reach
    assert 0 < len(after) <= 3 and {line.step for line in after} == {"correction"}
    assert after[0].predicted_ms == pytest.approx(after[0].measured_ms, rel=0.05)
    assert 0.93 <= result.report.final.p50_ms / budget <= 1
    graph = trace(*net)
    rest = graph.without(result.plan.removed)
    assert sum(p.numel() for p in result.module.parameters()) == rest.params(result.plan.counts)
    assert result.report.final.params == rest.params(result.plan.counts)
    assert result.report.final.macs == rest.macs(result.plan.counts)
    assert "taken out whole" in (result.run_dir / "report.html").read_text()
    again = apply(net[0], graph, Plan.from_json((result.run_dir / "plan.json").read_text()))
    assert torch.equal(again(net[1]), result.module(net[1]))
    assert all(axis.kept for axis in result.report.axes if axis.name in {a.name for a in rest.axes})


def test_blocks_stay_where_widths_reach(net, target, tmp_path, floor):
    _, whole, widths, _ = floor
    result = run(net, target, tmp_path / "r", budget_ms=widths + 0.2 * (whole - widths))
    assert result.met and result.plan.removed == ()


def test_resume_takes_out_the_same_blocks(net, target, tmp_path, floor):
    budget = (floor[2] + floor[3]) / 2
    whole = run(net, target, tmp_path / "whole", budget_ms=budget)
    seen = []

    def stop(step):
        seen.append(step)
        if step.number == 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(net, target, tmp_path / "r", budget_ms=budget, progress=stop)
    result = run(net, target, tmp_path / "r", budget_ms=budget, resume=True)
    assert result.plan == whole.plan
    keys = Journal(tmp_path / "r/journal.jsonl").keys
    assert [k for k in keys if not k.startswith("session")] == [
        k for k in Journal(tmp_path / "whole/journal.jsonl").keys if not k.startswith("session")
    ]


def test_data_decides_which_blocks_matter(target, tmp_path, floor):
    torch.manual_seed(0)
    model = Deep().eval()
    with torch.no_grad():
        for number in (0, 4):  # blocks that do nothing
            model.blocks[number].up.weight.mul_(1e-6)
            model.blocks[number].up.bias.zero_()
    example = torch.randn(1, 3, 8, 8)
    batches = [((torch.randn(16, 3, 8, 8),), None)]
    budget = floor[3] + 0.8 * (floor[2] - floor[3])
    result = run((model, example), target, tmp_path / "r", budget_ms=budget, batches=batches)
    assert result.met and set(result.plan.removed) >= {"blocks.0", "blocks.4"}


class Normed(nn.Module):
    """A block most of whose operators work on the shortcut's channels alone."""

    def __init__(self):
        super().__init__()
        self.before, self.after = (nn.InstanceNorm2d(32, affine=True) for _ in "ab")
        self.a, self.b = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1)
        self.c, self.d = nn.Conv2d(32, 64, 1), nn.Conv2d(64, 32, 1)

    def forward(self, x):
        x = x + self.b(self.a(self.before(x)).relu())
        return x + self.d(self.c(self.after(x)).relu())


@pytest.mark.parametrize("speedup", [1.4, 2.2])
def test_a_block_takes_all_of_its_operators_with_it(target, tmp_path, speedup):
    torch.manual_seed(0)
    blocks = [Normed() for _ in range(4)]
    end = nn.InstanceNorm2d(32, affine=True), nn.Conv2d(32, 4, 1)
    net, x = nn.Sequential(nn.Conv2d(8, 32, 1), *blocks, *end).eval(), torch.randn(1, 8, 4, 4)
    result = run((net, x), target, tmp_path / "r", speedup=speedup, cache=False)
    _, after = [line for line in result.report.steps if line.verdict][:2]
    assert after.predicted_ms == pytest.approx(after.measured_ms, rel=0.1)
    assert result.met and 0 < len(result.plan.removed) < 4


@pytest.fixture(scope="module")
def whole(net):
    """The allocation problem of the net at twice the latency of no pruning at all."""
    graph = trace(*net)
    model = fit(graph, [Build({}, (), 10.0)])
    curves = importance_curves(graph, {a.name: torch.ones(a.size) for a in graph.prunable})
    return Problem(graph, model, choices(graph, curves, multiple=8), 20.0)


def test_those_go_that_the_best_plan_lacks(whole):
    names = [block.name for block in depth.removable(whole.graph)]
    little = {name: 0.002 * number for number, name in enumerate(names)}
    least = [0] * len(whole.choices)
    blocks = depth.removals(whole, little)
    assert [block.name for block in blocks] == names
    floor, none = whole.model.predict(whole.counts(least)), [False] * len(blocks)
    bare = replace(whole, blocks=blocks).predict(least, none)
    between = replace(whole, budget_ms=(floor + bare) / 2)
    found = depth.choose(between, little)
    assert 0 < len(found) < len(names)
    best = allocate(replace(between, blocks=blocks), "milp")
    assert found == best.removed
    dear = little | dict.fromkeys(found, 5.0)
    assert set(depth.choose(between, dear)).isdisjoint(found)
    assert depth.choose(replace(whole, budget_ms=0.5 * bare), little) == tuple(names)
    assert depth.choose(replace(whole, budget_ms=-1.0), little) == tuple(names)


def test_one_goes_where_widths_are_predicted_to_reach(whole):
    losses = {block.name: 1.0 for block in depth.removable(whole.graph)}
    assert depth.choose(whole, losses | {"blocks.4": 0.5}) == ("blocks.4",)
    endless = dict.fromkeys(losses, float("inf"))
    assert depth.choose(whole, endless | {"blocks.1": 2.0}) == ("blocks.1",)
    assert depth.choose(whole, endless) == tuple(losses)


def test_all_go_where_a_cap_asks_for_one_that_loses_without_end(whole):
    losses = {block.name: 1.0 for block in depth.removable(whole.graph)}
    widest = losses | {"blocks.2": float("inf")}
    counts = whole.counts([0] * len(whole.choices))
    rest = whole.graph.without([name for name in losses if name != "blocks.2"])
    least = rest.params(counts)
    assert depth.choose(replace(whole, max_params=least - 1), widest) == tuple(losses)
    assert "blocks.2" not in depth.choose(replace(whole, max_params=least), widest)


def test_a_block_that_saves_nothing_is_not_offered(whole):
    losses = {block.name: 1.0 for block in depth.removable(whole.graph)}
    free = [
        replace(o, share=0.0) if o.name.startswith("blocks.0.") else o
        for o in whole.model.operators
    ]
    one = replace(whole, model=replace(whole.model, operators=tuple(free)))
    assert depth.choose(one, losses | {"blocks.0": 0.0, "blocks.3": 0.5}) == ("blocks.3",)


def test_savings_are_the_operators_that_go(whole):
    graph, model = whole.graph, whole.model
    times = model.predict_operators({})
    for block in depth.removals(whole, dict.fromkeys([b.name for b in graph.blocks], 0.0)):
        saved = sum(times[number] for number in block.operators) / sum(times)
        rest = graph.without((block.name,)).macs()
        assert saved == pytest.approx(1 - rest / graph.macs(), 1e-3)
