"""Operators of several builds pair up whatever runtimes call them."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prune2deploy.plan.latency_model import Build, fit
from prune2deploy.plan.pairing import align
from prune2deploy.plan.probes import probes
from prune2deploy.timing import OperatorTiming

from .made import chain, engine, total_ms

KINDS = ("Gemm", "Add", "Gelu", "Transpose")


def sequence(kinds, first=0):
    """Operators whose names count up from ``first`` and whose time is their true place."""
    return [
        OperatorTiming(f"{kind}_{first + place}", kind, ((1, 4),), ((1, 4),), float(place))
        for place, kind in enumerate(kinds)
    ]


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.lists(st.sampled_from(KINDS), min_size=6, max_size=40),
    st.integers(0, 10_000),
    st.integers(1, 5),
)
def test_a_build_with_operators_of_its_own_pairs_up_in_order(kinds, seed, many):
    """Operators of a new kind are put in at random; all that both have correspond."""
    rng = np.random.default_rng(seed)
    one, other = sequence(kinds), sequence(kinds, first=1000)
    for place in sorted(rng.integers(0, len(kinds) + 1, many), reverse=True):
        other.insert(place, OperatorTiming(f"new{place}", "Reorder", (), (), -1.0))
    found = align([one, other])
    both = [seen for seen in found if len(seen.timings) == 2]
    assert len(both) == len(kinds)
    assert all(seen.timings[0].ns == seen.timings[1].ns for seen in both)
    assert [seen.kind for seen in found if list(seen.timings) == [1]] == ["Reorder"] * many


def test_order_is_kept_and_no_timing_is_used_twice_or_lost():
    rng = np.random.default_rng(0)
    for _ in range(30):
        profiles = [
            sequence([KINDS[i] for i in rng.integers(0, 4, rng.integers(3, 20))], first=100 * b)
            for b in range(3)
        ]
        found = align(profiles)
        for build, profile in enumerate(profiles):
            used = [seen.timings[build] for seen in found if build in seen.timings]
            assert sorted(t.name for t in used) == sorted(t.name for t in profile)
            common = [t.ns for seen in found for b, t in seen.timings.items()
                      if b == build and len(seen.timings) == 3]  # fmt: skip
            assert common == sorted(common)


def test_equal_names_decide_where_nearly_all_agree():
    one = sequence(["Gemm"] * 20)
    swapped = [one[1], one[0], *one[2:]]
    for seen in align([one, swapped]):
        assert seen.timings[0].name == seen.timings[1].name


@pytest.mark.parametrize("seed", range(3))
def test_an_unpruned_build_of_another_form_does_not_spoil_the_model(seed):
    """As where the pruned module is captured: other names, an input more, an operator more."""
    graph = chain((64, 96, 128, 64))
    plans = probes(graph, 5, multiple=16, seed=seed)
    whole = [
        dataclasses.replace(
            one,
            name=f"own/{one.name}",
            input_shapes=(*one.input_shapes, (one.output_shapes[0][1],)),
        )
        for one in engine(graph, {})
    ]
    whole.insert(3, OperatorTiming("own/squeeze", "Squeeze", ((1, 3),), ((3,),), 10.0))
    builds = [Build({}, tuple(whole), total_ms(whole))]
    builds += [Build(plan, engine(graph, plan)) for plan in plans[:4]]
    model = fit(graph, builds, multiple=16)
    assert not model.unmatched
    for counts in (*plans, dict.fromkeys(plans[0], 16)):
        assert model.operators_ms(counts) == pytest.approx(
            total_ms(engine(graph, counts)), rel=0.06
        )
