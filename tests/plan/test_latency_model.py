"""The latency model learns a known cost formula from few builds."""

import dataclasses

import numpy as np
import pytest

from prune2deploy.errors import PlanError
from prune2deploy.plan.latency_model import Build, fit, points_of
from prune2deploy.plan.probes import probes
from prune2deploy.timing import OperatorTiming

from .made import builds, chain, const, engine, graph_of, layer, total_ms, width

SIZES = (64, 128, 128, 64, 256, 128, 64)


@pytest.fixture(scope="module")
def graph():
    return chain(SIZES)


def fitted(graph, number=4, noise=0.0, seed=0, **options):
    plans = [{}, *probes(graph, number, multiple=16, seed=seed)]
    rng = np.random.default_rng(seed)
    return fit(graph, builds(graph, plans, noise=noise, rng=rng, **options), multiple=16)


def errors(graph, model, seed=99):
    held = probes(graph, 20, multiple=16, seed=seed)
    return [model.operators_ms(c) / total_ms(engine(graph, c)) - 1 for c in held]


def test_held_out_plans_are_predicted_within_two_per_cent(graph):
    model = fitted(graph)
    assert model.method == "profiles"
    assert model.unmatched == ()
    assert np.median(np.abs(errors(graph, model))) < 0.02


def test_noise_of_five_per_cent_per_operator_averages_out(graph):
    model = fitted(graph, number=6, noise=0.05)
    assert np.median(np.abs(errors(graph, model))) < 0.03


def test_widths_inside_one_block_cost_the_same(graph):
    model = fitted(graph)
    names = [o.name for o in model.operators]
    place = names.index("op2")
    just_above, whole = ({"a2": n} for n in (65, 80))
    assert model.predict_operators(just_above)[place] == pytest.approx(
        model.predict_operators(whole)[place]
    )
    assert model.predict_operators({"a2": 64})[place] < model.predict_operators(whole)[place]


def test_operators_without_names_in_common_are_matched_by_order(graph):
    plans = [{}, *probes(graph, 4, multiple=16)]
    made = [
        Build(b.counts, tuple(dataclasses.replace(o, name=f"{i}/{o.name}") for o in b.profile))
        for i, b in enumerate(builds(graph, plans))
    ]
    model = fit(graph, made, multiple=16)
    assert model.unmatched == ()
    assert np.median(np.abs(errors(graph, model))) < 0.02


def test_axes_are_recognised_by_shapes_alone(graph):
    model = fitted(graph)
    for number, one in enumerate(graph.layers):
        operator = next(o for o in model.operators if o.name == f"op{number}")
        assert operator.work.macs.axes == one.macs.axes


def test_work_of_a_concatenation_is_a_sum_of_axes():
    layers = [
        layer("one", const(3), width("a"), 64),
        layer("two", width("a"), width("b"), 64),
        layer("three", width("a", "b"), width("c"), 64),
    ]
    graph = graph_of({"a": 64, "b": 64, "c": 64}, layers)
    model = fitted(graph, number=5)
    operator = next(o for o in model.operators if o.name == "op2")
    assert operator.axes == {"a", "b", "c"}
    assert operator.work.macs({"a": 16, "b": 32, "c": 48}) == 48 * 48 * 9 * 64


def test_a_shape_that_no_axis_explains_counts_as_constant_and_is_named(graph):
    plans = [{}, *probes(graph, 3, multiple=16)]
    odd = [(1, n) for n in (17, 5, 11, 3)]
    made = [
        Build(b.counts, (*b.profile, OperatorTiming("odd", "Top", (shape,), (shape,), 7000.0)))
        for b, shape in zip(builds(graph, plans), odd, strict=True)
    ]
    model = fit(graph, made, multiple=16)
    assert model.unmatched == ("odd",)
    place = [o.name for o in model.operators].index("odd")
    assert model.predict_operators({})[place] == pytest.approx(0.007)


def test_an_operator_of_some_builds_counts_by_its_share(graph):
    plans = [{}, *probes(graph, 3, multiple=16)]
    extra = OperatorTiming("reorder", "Reorder", ((1, 3),), ((1, 3),), 8000.0)
    made = builds(graph, plans)
    made[2] = Build(made[2].counts, (*made[2].profile, extra))
    model = fit(graph, made, multiple=16)
    place = [o.name for o in model.operators].index("reorder")
    assert model.predict_operators({})[place] == pytest.approx(0.008 / 4)


def test_offset_reproduces_what_was_measured_and_is_renewed_by_it(graph):
    model = fitted(graph)
    full = total_ms(engine(graph, {})) + 0.3
    assert model.predict({}) == pytest.approx(full, rel=0.01)
    counts = probes(graph, 1, multiple=16, seed=7)[0]
    truth = model.predict(counts) * 1.08
    again = model.measured(counts, truth)
    assert again.predict(counts) == pytest.approx(truth, rel=0.02)
    assert again.predict({}) == pytest.approx(full, rel=0.03)


def test_a_measured_cell_overrides_its_prediction(graph):
    plans = [{}, *probes(graph, 4, multiple=16)]
    made = builds(graph, plans)
    there = {**plans[1], "a3": 32, "a4": 64}

    def slow(profile):
        return tuple(
            dataclasses.replace(o, ns=1.5 * o.ns) if o.name == "op4" else o for o in profile
        )

    before = fit(graph, made, multiple=16)
    after = fit(graph, [*made, Build(there, slow(engine(graph, there)))], multiple=16)
    place = [o.name for o in after.operators].index("op4")
    truth = slow(engine(graph, there))[8].ns / 1e6
    missed = abs(before.predict_operators(there)[place] - truth)
    assert abs(after.predict_operators(there)[place] - truth) < 0.65 * missed


def test_a_wide_interval_moves_the_prediction_less_than_a_narrow_one(graph):
    there = probes(graph, 1, multiple=16, seed=9)[0]
    model = fitted(graph)
    before = model.predict(there)
    narrow, wide = (
        abs(model.measured(there, 1.2 * before, half).predict(there) - before)
        for half in (0.01, 0.2)
    )
    assert 0 < wide < 0.5 * narrow


def test_operator_budget_inverts_the_prediction(graph):
    model = fitted(graph)
    budget = 0.6 * model.predict({})
    operators = model.operator_budget_ms(budget)
    assert operators + model.offset_ms(operators) == pytest.approx(budget, rel=1e-6)


def test_points_of_another_model_on_the_device_replace_probes(graph):
    made = builds(graph, [{}, *probes(graph, 4, multiple=16)])
    known = points_of(graph, made, multiple=16)
    sibling = chain((128, 64, 64, 128))
    plans = [{}, *probes(sibling, 2, multiple=16)]
    model = fit(sibling, builds(sibling, plans, noise=0.1), multiple=16, known=known)
    alone = fit(sibling, builds(sibling, plans, noise=0.1), multiple=16)
    helped, before = (np.median(np.abs(errors(sibling, m))) for m in (model, alone))
    assert helped <= before
    assert helped < 0.05


def test_without_profiles_time_follows_macs_and_a_fixed_cost(graph):
    plans = [{}, *probes(graph, 3, multiple=16)]
    made = [Build(c, (), 2.0 + 1e-8 * graph.macs(c)) for c in plans]
    model = fit(graph, made)
    assert model.method == "macs"
    held = probes(graph, 1, multiple=16, seed=5)[0]
    assert model.predict(held) == pytest.approx(2.0 + 1e-8 * graph.macs(held), rel=0.01)


def test_nothing_profiled_or_measured_is_an_error(graph):
    with pytest.raises(PlanError, match="needs at least one"):
        fit(graph, [Build({})])


def test_probes_keep_the_grid_and_tell_axes_apart():
    graph = chain((64,) * 12)
    plans = probes(graph, 3, multiple=16)
    assert all(width_ % 16 == 0 for plan in plans for width_ in plan.values())
    codes = [tuple(plan[axis.name] for plan in plans) for axis in graph.prunable]
    assert len(set(codes)) == len(codes)


def test_more_probes_begin_with_the_same_ones(graph):
    assert probes(graph, 5, multiple=16)[:3] == probes(graph, 3, multiple=16)


@pytest.mark.parametrize("extra", [500.0, 1500.0])
def test_what_profiling_adds_to_every_operator_is_no_work(graph, extra):
    """Profiled, operators of 2 us and little more add up to more than any plan takes."""
    plans = [{}, *probes(graph, 3, multiple=16)]
    true = builds(graph, plans, offset_ms=0.0, fixed=2000.0)
    loud = [
        dataclasses.replace(
            b,
            profile=tuple(dataclasses.replace(o, ns=o.ns + extra) for o in b.profile),
            measured_ms=b.measured_ms if not b.counts else None,
        )
        for b in true
    ]
    model, least = fit(graph, loud, multiple=16), {a.name: 16 for a in graph.prunable}
    assert model.predict(least) == pytest.approx(total_ms(engine(graph, least)), rel=0.03)
    seen = [dataclasses.replace(b, measured_ms=0.5 * b.measured_ms) for b in true[:1]]
    slow = fit(graph, [*seen, *loud[1:]], multiple=16)  # another speed: no operator takes nothing
    assert all(operator.ns(slow.sizes) >= 0 for operator in slow.operators)
