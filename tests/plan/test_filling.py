"""Plans that fill a budget, against all plans there are."""

from dataclasses import replace

import numpy as np
import pytest

from prune2deploy.plan import filling
from prune2deploy.plan.allocate import allocate
from prune2deploy.plan.filling import NEAR, fuller

from .made import chain, problem_of

WIDTHS = (64, 96, 80, 64)


@pytest.fixture(params=range(6))
def problem(request):
    return problem_of(chain(WIDTHS), request.param, 0.3 + 0.1 * request.param)


def everything(problem, found, least_ms):
    """Worth of all plans that may be given back, by picks, the worthiest first."""
    low, high = problem.ends
    start = [c.options.tolist().index(found.counts[c.axes[0]]) for c in problem.choices]
    good = {}
    for picks in np.ndindex(*(len(c.options) for c in problem.choices)):
        moved = [abs(a - b) for a, b in zip(picks, start, strict=True) if a != b]
        if len(moved) not in (1, 2) or min(moved) > 2:
            continue
        counts = problem.counts(picks)
        macs = problem.max_macs is None or problem.graph.macs(counts) <= problem.max_macs
        fits = least_ms <= problem.predict(picks) <= problem.budget_ms and macs
        if fits and problem.worth(picks) >= found.objective - NEAR * (high - low):
            good[picks] = problem.worth(picks)
    return good


@pytest.mark.parametrize("share", [0.9, 0.95, 0.99])
def test_the_worthiest_plans_that_fill_the_budget_are_found(problem, share):
    found = allocate(problem)
    least = share * problem.budget_ms
    wanted = everything(problem, found, least)
    plans = fuller(problem, found, least)
    worths = [plan.objective for plan in plans]
    assert worths == sorted(worths, reverse=True)
    for plan in plans:
        picks = tuple(c.options.tolist().index(plan.counts[c.axes[0]]) for c in problem.choices)
        assert wanted[picks] == pytest.approx(plan.objective)
        assert problem.model.predict(plan.counts) == pytest.approx(plan.predicted_ms)
    assert bool(plans) == bool(wanted)
    if wanted:
        assert worths[0] == pytest.approx(max(wanted.values()))


def test_caps_hold_while_a_budget_is_filled(problem, monkeypatch):
    monkeypatch.setattr(filling, "NEAR", 10.0)  # whatever it is worth
    whole = allocate(problem)
    capped = replace(problem, max_macs=int(0.97 * problem.graph.macs(whole.counts)))
    found = allocate(capped)
    plans = fuller(capped, found, 0.5 * problem.budget_ms)
    assert plans
    assert all(problem.graph.macs(plan.counts) <= capped.max_macs for plan in plans)
