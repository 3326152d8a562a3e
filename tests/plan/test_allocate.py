"""Allocators against brute force, and against each other."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune2deploy.errors import PlanError
from prune2deploy.plan.allocate import (
    METHODS,
    SmallestMisses,
    allocate,
    channels,
    optimality_gap,
)
from prune2deploy.plan.choices import (
    Problem,
    allowed,
    choices,
    grid,
    importance_curves,
    leaving_choice,
)
from prune2deploy.plan.evaluate import Evaluator
from prune2deploy.plan.latency_model import fit
from prune2deploy.plan.probes import probes

from .made import builds, chain, const, graph_of, layer, width

SEEDS = st.integers(0, 1000)
QUICK = settings(max_examples=15, deadline=None, derandomize=True)


def concatenating():
    """Layers that read sums of axes, a tie, and a frozen axis."""
    layers = [
        layer("one", const(3), width("a"), 64),
        layer("two", width("a"), width("b"), 64),
        layer("three", width("a", "b"), width("c"), 64),
        layer("four", width("c", "b", "a"), width("d"), 64),
        layer("five", width("d"), width("out"), 64),
    ]
    sums = (width("a", "b"), width("c", "b", "a"))
    sizes = {"a": 48, "b": 64, "c": 64, "d": 64, "out": 32}
    return graph_of(sizes, layers, frozen=("out",), ties={"c": 1, "d": 1}, widths=sums)


def problem(graph, share, seed=0, **caps):
    plans = [{}, *probes(graph, 4, multiple=16)]
    model = fit(graph, builds(graph, plans), multiple=16)
    rng = np.random.default_rng(seed)
    scores = {a.name: rng.random(a.size) * rng.uniform(0.2, 2) for a in graph.prunable}
    offered = choices(graph, importance_curves(graph, scores), multiple=16)
    return Problem(graph, model, offered, share * model.predict({}), **caps)


def brute(one):
    """The best assignment by trying all, with the model's own prediction."""
    best, worth = None, -np.inf
    for picks in itertools.product(*(range(len(c.options)) for c in one.choices)):
        counts = one.counts(picks)
        fits = (
            one.model.predict(counts) <= one.budget_ms * (1 + 1e-6)
            and (one.max_params is None or one.graph.params(counts) <= one.max_params)
            and (one.max_macs is None or one.graph.macs(counts) <= one.max_macs)
        )
        if fits and one.worth(picks) > worth:
            best, worth = counts, one.worth(picks)
    return best, worth


@QUICK
@given(SEEDS, st.sampled_from([0.4, 0.55, 0.7, 0.85]))
def test_exact_method_agrees_with_brute_force(seed, share):
    one = problem(chain((64, 64, 48, 64)), share, seed)
    _, worth = brute(one)
    found = allocate(one, "milp")
    assert found.objective == pytest.approx(worth, rel=1e-3)
    assert found.predicted_ms <= one.budget_ms * (1 + 1e-6)
    gap = optimality_gap(one, found.counts)
    assert gap.exact and gap.share < 1e-3


@QUICK
@given(SEEDS, st.sampled_from([0.5, 0.65, 0.8]))
def test_search_comes_close_to_brute_force(seed, share):
    for graph in (chain((64, 64, 48, 64)), concatenating()):
        one = problem(graph, share, seed)
        _, worth = brute(one)
        found = allocate(one)
        assert found.objective >= 0.97 * worth
        assert found.predicted_ms <= one.budget_ms * (1 + 1e-6)


def test_search_equals_brute_force_nearly_always():
    ratios = []
    for seed in range(12):
        one = problem(concatenating(), 0.6, seed)
        ratios.append(allocate(one).objective / brute(one)[1])
    assert np.mean(ratios) > 0.995


@pytest.mark.parametrize("cap", ["max_params", "max_macs"])
def test_caps_are_kept(cap):
    graph = chain((64, 64, 48, 64))
    whole = graph.params() if cap == "max_params" else graph.macs()
    one = problem(graph, 0.9, **{cap: int(0.4 * whole)})
    _, worth = brute(one)
    for method in ("milp", "lagrangian"):
        found = allocate(one, method)
        used = graph.params(found.counts) if cap == "max_params" else graph.macs(found.counts)
        assert used <= 0.4 * whole
        assert found.objective >= 0.97 * worth


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_budget_ties_grid_and_frozen_axes(method):
    graph = concatenating()
    one = problem(graph, 0.6)
    found = allocate(one, method)
    assert found.predicted_ms <= one.budget_ms * (1 + 1e-6)
    assert found.predicted_ms == pytest.approx(one.model.predict(found.counts))
    assert found.counts["c"] == found.counts["d"]
    assert "out" not in found.counts
    assert all(c % 16 == 0 or c == graph[n].size for n, c in found.counts.items())


def test_search_beats_the_simple_methods():
    one = problem(chain((64, 128, 128, 64, 256, 128)), 0.5)
    best = allocate(one).objective
    for method in ("uniform", "global", "greedy"):
        assert best >= allocate(one, method).objective - 1e-9


def test_curve_rises_in_both():
    curve = allocate(problem(chain((64, 128, 128, 64)), 0.5)).curve
    assert len(curve) > 3
    assert all(a[0] <= b[0] and a[1] < b[1] for a, b in itertools.pairwise(curve))


def test_budget_below_the_floor_says_floor():
    one = problem(chain((64, 64)), 0.01)
    with pytest.raises(SmallestMisses) as caught:
        allocate(one)
    least = min(
        one.model.predict(one.counts(p))
        for p in itertools.product(*(range(len(c.options)) for c in one.choices))
    )
    assert caught.value.floor_ms == pytest.approx(least)
    assert one.model.predict(caught.value.counts) == pytest.approx(least)


def test_cap_below_the_floor_and_unknown_methods_are_errors():
    for share in (0.9, 0.01):
        with pytest.raises(PlanError, match="a cap of 10 parameters"):
            allocate(problem(chain((64, 64)), share, max_params=10))
    with pytest.raises(PlanError, match="choose from lagrangian"):
        allocate(problem(chain((64, 64)), 0.9), "best")


@QUICK
@given(SEEDS)
def test_incremental_costs_equal_the_model(seed):
    one = problem(concatenating(), 0.7, max_params=10**9, max_macs=10**9)
    rng = np.random.default_rng(seed)
    evaluator = Evaluator(one)
    for _ in range(6):
        g = int(rng.integers(len(one.choices)))
        option = int(rng.integers(len(one.choices[g].options)))
        expected = evaluator.costs(g)[:, option]
        evaluator.set(g, option)
        counts = one.counts(evaluator.chosen.tolist())
        truth = [one.model.operators_ms(counts), one.graph.params(counts), one.graph.macs(counts)]
        np.testing.assert_allclose(evaluator.totals, truth, rtol=1e-9)
        np.testing.assert_allclose(expected, truth, rtol=1e-9)


def test_grid_lets_the_widest_axis_of_a_product_carry_the_multiple():
    product = const(1)
    for name in ("heads", "dim"):
        product = product * width(name)
    made = layer("proj", product, width("out"), 1, 1)
    graph = graph_of({"heads": 12, "dim": 64, "out": 768}, [made])
    steps = grid(graph, 16)
    assert steps == {"heads": 1, "dim": 16, "out": 16}


@pytest.mark.parametrize("least", [0.8, 0.5, 0.25, 0.0])
@pytest.mark.parametrize("heads", [3, 8, 12])
def test_the_narrowest_product_of_axes_keeps_the_least_share_of_a_layer(heads, least):
    inner, both = width("heads") * width("dim"), width("heads") * width("other")
    layers = [
        layer("qk", width("stem"), inner, 1, 1),
        layer("v", width("stem"), both, 1, 1),
        layer("proj", both, const(10), 1, 1),
    ]
    sizes = {"stem": 64, "heads": heads, "dim": 64, "other": 32}
    graph = graph_of(sizes, layers)
    curves = {name: np.arange(size + 1.0) for name, size in sizes.items()}
    offered = choices(graph, curves, multiple=8, least=least)
    counts = {**sizes, **{c.axes[0]: int(c.options[0]) for c in offered}}
    for one in layers:
        share = one.out_width(counts) / one.out_width(sizes)
        assert least <= share <= max(2 * least, 0.1) or share == 1
    assert counts["stem"] == max(8, 8 * math.ceil(8 * least))


def test_allowed_widths_hold_the_full_one_and_the_least():
    assert allowed(40, 16, 1, 32).tolist() == [16, 32, 40]
    assert allowed(128, 16, 64, 32).tolist() == [64, 80, 96, 112, 128]
    assert allowed(8, 16, 1, 32).tolist() == [8]
    thinned = allowed(2048, 16, 16, 8)
    assert len(thinned) == 8
    assert (thinned[0], thinned[-1]) == (16, 2048)


@pytest.mark.parametrize(("work", "step"), [(64, 16), (1, 8)])
def test_a_step_that_only_layers_of_little_work_can_follow_is_made_finer(work, step):
    layers = [
        layer("narrow", const(3), width("a"), 64),
        layer("wide", width("a"), width("b"), work),
        layer("last", width("b"), const(10), work),
    ]
    assert leaving_choice(graph_of({"a": 16, "b": 64}, layers), 16) == step


def test_channels_keeps_the_best_and_checks_scores():
    graph = chain((4, 4))
    plan = channels(graph, {"a0": [0.1, 3, 2, 0.5], "a1": [1, 1, 1, 1]}, {"a0": 2, "a1": 3})
    assert plan.kept == {"a0": (1, 2), "a1": (0, 1, 2)}
    with pytest.raises(PlanError, match="has no scores"):
        channels(graph, {}, {"a0": 2})
    with pytest.raises(PlanError, match="are not finite"):
        importance_curves(graph, {"a0": [1, 2, 3, float("nan")], "a1": [1] * 4})


def test_spread_tables_agree_with_the_operator_where_it_stands():
    one = problem(concatenating(), 0.7)
    evaluator = Evaluator(one)
    evaluator.assign([0] * len(one.choices))
    wide = [o for o in range(len(evaluator.terms.cost)) if len(evaluator.involved(o)) > 2]
    assert wide
    for operator in wide:
        parts = evaluator.spread(operator)
        assert all(len(key) <= 2 for key in parts)
        total = sum(float(table[(0,) * table.ndim]) for table in parts.values())
        assert total == pytest.approx(float(evaluator.table(operator, ())))


def test_exact_method_stays_close_with_long_concatenations():
    for seed in range(4):
        one = problem(concatenating(), 0.6, seed)
        found = allocate(one, "milp")
        assert not optimality_gap(one, found.counts).exact
        assert found.objective >= 0.99 * brute(one)[1]
