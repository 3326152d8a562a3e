"""Blocks and widths chosen together, against trying everything."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune2deploy.errors import PlanError
from prune2deploy.plan.allocate import METHODS, SmallestMisses, allocate
from prune2deploy.plan.baselines import BASELINES
from prune2deploy.plan.choices import Choice, Problem, choices, importance_curves
from prune2deploy.plan.evaluate import Evaluator

from .made import removals, residual, residual_model

SEEDS = st.integers(0, 1000)
QUICK = settings(max_examples=15, deadline=None, derandomize=True)
INNERS = ((48, 32), (48,), (64,))  # the first block has two choices of its own


def curves_of(graph, rng):
    scores = {a.name: rng.random(a.size) * rng.uniform(0.2, 2) for a in graph.prunable}
    return importance_curves(graph, scores)


def problem(share, seed=0, *, tied=(), shared=False, losses=(0.02, 0.01, 0.03), **more):
    """Three blocks; with ``shared`` the addition of ``b1`` goes with ``b2`` as well."""
    rng = np.random.default_rng(seed)
    graph = residual(48, INNERS, tied)
    model = residual_model(graph, rng)
    offered = choices(graph, curves_of(graph, rng), multiple=16)
    blocks = removals(graph, model, [loss * rng.uniform(0, 3) for loss in losses])
    if shared:
        add = next(i for i, o in enumerate(model.operators) if o.name == "b1.add")
        last = replace(blocks[2], operators=blocks[2].operators | {add})
        blocks = (*blocks[:2], last)
    return Problem(graph, model, offered, share * model.predict({}), blocks=blocks, **more)


def flags(one):
    return itertools.product((True, False), repeat=len(one.blocks))


class Truth:
    """Cost and worth of whole assignments, from the graph that is left and nothing else."""

    def __init__(self, one, kept):
        self.problem = one
        out = [b for b, stays in zip(one.blocks, kept, strict=True) if not stays]
        self.names = tuple(b.name for b in out)
        self.graph = one.graph.without(self.names)
        self.limit = one.model.operator_budget_ms(one.budget_ms)
        self.lost = sum(b.loss for b in out)
        numbers = frozenset().union(*(b.operators for b in out))
        left = [o for i, o in enumerate(one.model.operators) if i not in numbers]
        self.model = replace(one.model, operators=tuple(left))
        self._ms = {}

    def operators_ms(self, counts):
        return sum(self._one(number, counts) for number in range(len(self.model.operators)))

    def _one(self, number, counts):
        operator = self.model.operators[number]
        key = (number, *(counts.get(axis) for axis in sorted(operator.axes)))
        if key not in self._ms:
            self._ms[key] = replace(self.model, operators=(operator,)).operators_ms(counts)
        return self._ms[key]

    def counts(self, picks):
        left = {axis.name for axis in self.graph.axes}
        offered = zip(self.problem.choices, picks, strict=True)
        return {
            a: int(choice.options[pick])
            for choice, pick in offered
            for a in choice.axes
            if a in left
        }

    def worth(self, picks):
        left = {axis.name for axis in self.graph.axes}
        total = -self.lost
        for choice, pick in zip(self.problem.choices, picks, strict=True):
            for axis, worth in zip(choice.axes, choice.by_axis, strict=True):
                total += worth[pick] if axis in left else 0.0
        return total

    def fits(self, picks):
        one, counts = self.problem, self.counts(picks)
        return (
            self.operators_ms(counts) <= self.limit * (1 + 1e-9)
            and (one.max_params is None or self.graph.params(counts) <= one.max_params)
            and (one.max_macs is None or self.graph.macs(counts) <= one.max_macs)
        )

    def costs(self, picks):
        counts = self.counts(picks)
        return [self.operators_ms(counts), self.graph.params(counts), self.graph.macs(counts)]


def brute(one, subsets=None):
    """The most that any blocks and widths within the limits are worth, and which blocks go."""
    best, removed = -np.inf, None
    for kept in subsets or flags(one):
        truth = Truth(one, kept)
        if len(truth.names) < one.least_removed:
            continue
        for picks in itertools.product(*(range(len(c.options)) for c in one.choices)):
            worth = truth.worth(picks)
            if worth > best and truth.fits(picks):
                best, removed = worth, truth.names
    return best, removed


def span(one):
    least, most = one.ends
    return most - least


SHARES = st.sampled_from([0.18, 0.25, 0.35, 0.5, 0.8])


@QUICK
@given(SEEDS, SHARES, st.integers(0, 2), st.booleans())
def test_exact_method_agrees_with_trying_everything(seed, share, least, shared):
    one = problem(share, seed, shared=shared, least_removed=least)
    worth, removed = brute(one)
    found = allocate(one, "milp")
    assert found.objective == pytest.approx(worth, abs=1e-3 * span(one))
    assert len(found.removed) >= least
    if found.objective == pytest.approx(worth, abs=1e-9):
        assert found.removed == removed
    assert found.predicted_ms <= one.budget_ms * (1 + 1e-6)
    assert found.counts.keys() == {a.name for a in one.graph.without(found.removed).axes}


@QUICK
@given(SEEDS, SHARES, st.integers(0, 2), st.booleans())
def test_search_comes_close_to_trying_everything(seed, share, least, shared):
    one = problem(share, seed, shared=shared, least_removed=least)
    found = allocate(one)
    assert found.objective >= 0.97 * brute(one)[0]
    assert found.predicted_ms <= one.budget_ms * (1 + 1e-6)
    assert len(found.removed) >= least


def test_search_finds_the_best_nearly_always():
    missed = []
    for seed in range(10):
        one = problem((0.2, 0.3)[seed % 2], seed)
        missed.append((brute(one)[0] - allocate(one).objective) / span(one))
    assert np.mean(missed) < 0.005


@pytest.mark.parametrize("cap", ["max_params", "max_macs"])
@pytest.mark.parametrize("seed", [0, 1])
def test_removed_blocks_count_towards_no_cap(cap, seed):
    graph = problem(1.0).graph
    whole = graph.params() if cap == "max_params" else graph.macs()
    one = problem(1.0, seed, **{cap: int(0.06 * whole)})  # below what the narrowest widths have
    narrowest = one.counts([0] * len(one.choices))
    assert (graph.params if cap == "max_params" else graph.macs)(narrowest) > 0.06 * whole
    worth, _ = brute(one)
    for method, near in (("milp", 1e-3), ("lagrangian", 0.03)):
        found = allocate(one, method)
        left = graph.without(found.removed)
        used = left.params(found.counts) if cap == "max_params" else left.macs(found.counts)
        assert found.removed and used <= 0.06 * whole
        assert found.objective >= worth - near * span(one)


@pytest.mark.parametrize("tied", [("b0.0", "b1.0"), ("stem", "b1.0")])
@pytest.mark.parametrize("seed", range(3))
def test_ties_that_lose_an_axis_are_worth_what_is_left(tied, seed):
    for share in (0.2, 0.3):
        one = problem(share, seed, tied=tied)
        assert any(set(tied) == set(c.axes) for c in one.choices)
        worth, _ = brute(one)
        assert allocate(one, "milp").objective == pytest.approx(worth, abs=1e-3 * span(one))
        assert allocate(one).objective >= worth - 0.03 * span(one)


def test_with_a_block_out_the_choices_are_those_of_the_graph_without_it():
    rng = np.random.default_rng(0)
    one = problem(0.5, tied=("b0.0", "b1.0"))
    curves = curves_of(one.graph, rng)
    whole = replace(one, choices=choices(one.graph, curves, multiple=16))
    left = one.graph.without(("b0",))
    anew = replace(one, graph=left, choices=choices(left, curves, multiple=16), blocks=())
    for pick in (0, 1, -1):
        counts = whole.counts([pick] * len(whole.choices), [False, True, True])
        assert counts == anew.counts([pick] * len(anew.choices))
        worth = whole.worth([pick] * len(whole.choices), [False, True, True])
        assert worth + one.blocks[0].loss == pytest.approx(anew.worth([pick] * len(anew.choices)))


@QUICK
@given(SEEDS, st.sampled_from([(), ("b0.0", "b1.0"), ("stem", "b1.0")]), st.booleans())
def test_incremental_costs_equal_the_graph_that_is_left(seed, tied, shared):
    one = problem(0.5, seed, tied=tied, shared=shared, max_params=10**9, max_macs=10**9)
    rng = np.random.default_rng(seed)
    evaluator = Evaluator(one)
    for _ in range(25):
        if rng.random() < 0.5:
            block = int(rng.integers(len(one.blocks)))
            worth, costs = evaluator.flipped(block)
            expected, worth = evaluator.totals + costs, evaluator.worth + worth
            evaluator.flip(block)
        else:
            g = int(rng.integers(len(one.choices)))
            option = int(rng.integers(len(one.choices[g].options)))
            expected = evaluator.costs(g)[:, option]
            worth = evaluator.worth - evaluator.worths[g][evaluator.chosen[g]]
            worth += evaluator.worths[g][option]
            evaluator.set(g, option)
        picks = evaluator.chosen.tolist()
        truth = Truth(one, evaluator.kept)
        np.testing.assert_allclose(evaluator.totals, truth.costs(picks), rtol=1e-9)
        np.testing.assert_allclose(evaluator.totals, expected, rtol=1e-9)
        assert evaluator.worth == pytest.approx(truth.worth(picks))
        assert evaluator.worth == pytest.approx(worth)
        assert evaluator.worth == pytest.approx(one.worth(picks, evaluator.kept.tolist()))
        predicted = one.predict(picks, evaluator.kept.tolist())
        ms = truth.operators_ms(truth.counts(picks))
        assert predicted == pytest.approx(ms + one.model.offset_ms(ms))
        fresh = Evaluator(one)
        fresh.assign(picks, evaluator.kept)
        np.testing.assert_allclose(fresh.totals, evaluator.totals, rtol=1e-9)
        left = {axis.name for axis in truth.graph.axes}
        idle = [g for g, c in enumerate(one.choices) if left.isdisjoint(c.axes)]
        assert [g for g in range(len(one.choices)) if evaluator.idle(g)] == idle


def test_an_idle_choice_keeps_its_option_and_costs_nothing():
    one = problem(0.5)
    evaluator = Evaluator(one)
    g = next(i for i, c in enumerate(one.choices) if c.axes == ("b1.0",))
    before = evaluator.costs(g)
    evaluator.flip(1)
    assert np.ptp(evaluator.costs(g)) == 0 and not evaluator.worths[g].any()
    np.testing.assert_allclose(
        np.diff(evaluator.costs(g, whole=True)), np.diff(before), rtol=1e-9
    )  # as if it were there
    evaluator.set(g, 0)
    evaluator.flip(1)
    np.testing.assert_allclose(evaluator.totals, before[:, 0], rtol=1e-9)


def one_width(graph, model, worths):
    """Choices between the full width and a channel less that is worth next to nothing."""
    found = [
        Choice(
            (a.name,), a.size, np.array([a.size - 1, a.size]), np.array([[-9.0, worths[a.name]]])
        )
        for a in graph.prunable
    ]
    return Problem(graph, model, tuple(found), 1.0)


def test_the_best_blocks_need_not_be_the_first_by_worth_per_time():
    """Least worth per millisecond first, as many as needed: here that takes out one too many."""
    graph = residual(16, ((32,), (40,), (48,)))
    model = residual_model(graph, np.random.default_rng(0), calls=0.0)
    plain = one_width(graph, model, dict.fromkeys(["stem"], 9.0) | dict.fromkeys(
        ["b0.0", "b1.0", "b2.0"], 0.0))  # fmt: skip
    blocks = removals(graph, model, (0.0, 0.0, 0.0))
    times = model.predict_operators({})
    saves = [sum(times[i] for i in block.operators) for block in blocks]
    saves_in_order = sorted(range(3), key=lambda b: saves[b])
    losses = dict(zip(saves_in_order, (1.0, 1.05, 9.0), strict=True))
    small, wide = saves_in_order[0], saves_in_order[1]
    losses[wide] = 1.05 * saves[wide] / saves[small]
    blocks = removals(graph, model, [losses[b] for b in range(3)])
    # the budget needs more than the smallest block saves, and less than the next one
    needed = (saves[small] + saves[wide]) / 2
    budget = model.operators_ms({}) - needed
    budget += model.offset_ms(budget)
    one = replace(plain, budget_ms=budget, blocks=blocks)
    order = sorted(range(3), key=lambda b: losses[b] / saves[b])
    assert order[:2] == [small, wide]
    prefixes = [tuple(b not in order[:many] for b in range(3)) for many in range(4)]
    greedy, _ = brute(one, prefixes)
    best, removed = brute(one)
    found = allocate(one, "milp")
    assert found.removed == removed == (f"b{wide}",)
    assert found.objective == pytest.approx(best)
    assert best - greedy == pytest.approx(losses[small])
    assert allocate(one).removed == removed


def test_blocks_have_to_go_where_it_is_asked_for():
    one = problem(2.0)
    for method in ("lagrangian", "milp"):
        assert allocate(one, method).removed == ()
        asked = allocate(replace(one, least_removed=2), method)
        assert len(asked.removed) == 2
        assert asked.objective == pytest.approx(brute(replace(one, least_removed=2))[0], abs=1e-6)
    with pytest.raises(PlanError, match="4 blocks have to go, but only 3 may"):
        allocate(replace(one, least_removed=4))


@pytest.mark.parametrize("method", BASELINES)
def test_simple_methods_keep_every_block(method):
    one = problem(0.6)
    found = allocate(one, method)
    assert found.removed == ()
    assert found.counts == allocate(replace(one, blocks=()), method).counts
    with pytest.raises(PlanError, match="keeps every block"):
        allocate(replace(one, least_removed=1), method)


def test_the_floor_is_without_the_blocks_that_may_go():
    one = problem(0.5)
    least = [0] * len(one.choices)
    widths, all_out = one.predict(least), one.predict(least, [False] * 3)
    assert all_out < 0.7 * widths
    between = replace(one, budget_ms=(widths + all_out) / 2)
    with pytest.raises(SmallestMisses):
        allocate(replace(between, blocks=()))
    assert {m: bool(allocate(between, m).removed) for m in ("milp", "lagrangian")} == {
        "milp": True, "lagrangian": True,
    }  # fmt: skip
    for method in METHODS:
        with pytest.raises(SmallestMisses) as caught:
            allocate(replace(one, budget_ms=0.9 * all_out), method)
        assert caught.value.floor_ms == pytest.approx(all_out)
        assert caught.value.counts.keys() == {"stem"}


def test_blocks_can_be_all_there_is_to_choose():
    one = replace(problem(0.5), choices=())
    found = allocate(one, "milp")
    assert found.removed and found.counts == {}
    assert found.objective == pytest.approx(brute(one)[0])
