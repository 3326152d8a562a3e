"""Measured sensitivity: envelopes, curves, and what the allocator makes of them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prune2deploy.errors import PlanError
from prune2deploy.plan.allocate import allocate
from prune2deploy.plan.choices import Problem, choices
from prune2deploy.plan.latency_model import fit
from prune2deploy.plan.probes import probes
from prune2deploy.plan.sensitivity import Sensitivity, curves, envelope, measure

from .made import builds, chain


def flat(graph):
    return {axis.name: np.zeros(axis.size + 1) for axis in graph.prunable}


@given(st.lists(st.floats(-5, 5), min_size=1, max_size=8))
def test_envelope_never_rises_with_width_and_covers_what_was_measured(rise):
    found = envelope(np.array(rise))
    assert (np.diff(found) <= 0).all()
    assert (found >= rise).all()
    assert (found >= 0).all()


def test_curve_goes_through_the_envelope_and_stays_monotone():
    curve = Sensitivity(("a",), 64, (16, 32, 48, 64), (0.9, 0.2, 0.3, 0.0)).curve()
    assert curve.shape == (65,)
    assert -curve[[16, 32, 48, 64]] == pytest.approx([0.9, 0.3, 0.3, 0.0])
    assert curve[0] < curve[16]
    assert (np.diff(curve) >= -1e-12).all()


def test_one_axis_is_cut_at_a_time_and_known_ones_are_not_measured_again():
    graph = chain((64, 64))
    asked = []

    def loss(counts):
        asked.append(dict(counts))
        return 1.0 + sum(64 - n for n in counts.values()) / 64

    offered = choices(graph, flat(graph), multiple=16)
    found = measure(offered, loss)
    assert asked[0] == {}
    assert all(len(counts) == 1 for counts in asked[1:])
    assert found["a0"].rise == pytest.approx((0.75, 0.5, 0.25, 0.0))
    count = len(asked)
    measure(offered, loss, known=found)
    assert len(asked) == count


def test_a_loss_that_is_not_finite():
    graph = chain((64,))
    offered = choices(graph, flat(graph), multiple=16)
    with pytest.raises(PlanError, match="unpruned model has loss nan"):
        measure(offered, lambda _: float("nan"))
    found = measure(offered, lambda counts: np.inf if counts.get("a0", 64) < 32 else 1.0)
    assert np.isfinite(found["a0"].rise).all()
    assert found["a0"].rise[0] > found["a0"].rise[1]


def test_the_allocator_cuts_what_is_redundant():
    graph = chain((128, 128, 128))
    model = fit(graph, builds(graph, [{}, *probes(graph, 4, multiple=16)]), multiple=16)

    def loss(counts):  # half of a1 does nothing
        sizes = graph.sizes(counts)
        return max(0, 64 - sizes["a1"]) + sum(128 - sizes[n] for n in ("a0", "a2"))

    measured = measure(choices(graph, flat(graph), multiple=16), loss)
    offered = choices(graph, curves(graph, measured), multiple=16)
    found = allocate(Problem(graph, model, offered, 0.7 * model.predict({})))
    assert found.counts["a1"] <= 64
    assert min(found.counts["a0"], found.counts["a2"]) >= 96
