"""What to build next: plans nearly as good are found, and compared by what the caller knows."""

from dataclasses import replace

import numpy as np
import pytest

from prune2deploy.config import FILL
from prune2deploy.plan.allocate import SmallestMisses, allocate, optimality_gap
from prune2deploy.plan.filling import fuller
from prune2deploy.search import planning
from prune2deploy.search.planning import NEAR, PlanRequest, near, propose, pruned

from ..plan.made import chain, problem_of


@pytest.fixture(params=[0, 1, 2])
def problem(request):
    return problem_of(chain((64, 96, 80, 64, 112)), request.param, 0.5)


def worth(problem, counts):
    picks = [int(np.searchsorted(c.options, counts[c.axes[0]])) for c in problem.choices]
    return problem.worth(picks)


def test_plans_nearly_as_good_keep_the_budget_and_differ(problem):
    best = allocate(problem)
    plans = near(problem, best)
    assert plans
    distinct = {tuple(sorted(plan.counts.items())) for plan in [best, *plans]}
    assert len(distinct) == len(plans) + 1
    span = sum(float(c.worth[-1] - c.worth[0]) for c in problem.choices)
    for plan in plans:
        assert problem.model.predict(plan.counts) <= problem.budget_ms * (1 + 1e-6)
        assert worth(problem, plan.counts) >= best.objective - NEAR * span - 1e-9


def test_the_rank_decides_between_plans_nearly_as_good(problem):
    plain = propose(PlanRequest(problem, problem.budget_ms, [], up=False))
    assert plain.ranked == 1
    asked = []

    def rank(counts):
        asked.append(dict(counts))
        return -counts["a2"]  # the model is said to be better the wider this axis is

    chosen = propose(PlanRequest(problem, problem.budget_ms, [], up=False, rank=rank))
    assert chosen.ranked == len(asked) > 1
    assert chosen.counts["a2"] == max(counts["a2"] for counts in asked)
    assert chosen.counts["a2"] >= plain.counts["a2"]
    assert problem.model.predict(chosen.counts) <= problem.budget_ms * (1 + 1e-6)


@pytest.mark.parametrize("up", [False, True])
def test_a_first_plan_fills_the_budget_too_where_nearly_as_good_a_plan_does(problem, up):
    some = 0
    for share in np.linspace(0.6, 0.95, 12):
        tight = replace(problem, budget_ms=share * problem.budget_ms)
        found = allocate(tight)
        if fuller(tight, found, FILL * tight.budget_ms):
            some += found.predicted_ms < FILL * tight.budget_ms
            wanted = propose(PlanRequest(tight, tight.budget_ms, [], up=up))
            assert FILL * tight.budget_ms <= wanted.predicted_ms <= tight.budget_ms * (1 + 1e-6)
    assert some


def test_a_plan_that_was_tried_is_not_wanted_again(problem):
    tried = []
    for _ in range(4):
        wanted = propose(
            PlanRequest(problem, problem.budget_ms, tried, up=False, rank=lambda _: 0.0)
        )
        assert pruned(problem.graph, wanted.counts) not in tried
        tried.append(pruned(problem.graph, wanted.counts))


def test_a_smallest_plan_that_was_tried_is_told_apart_from_nothing_left_to_try(
    problem, monkeypatch
):
    """The fastest plan that is found need not be the narrowest: residuals bend predictions."""
    counts = {"a1": 32, "a2": 48}

    def missing(one):
        found = SmallestMisses.__new__(SmallestMisses)
        found.counts, found.floor_ms = counts, 1.0
        raise found

    monkeypatch.setattr(planning, "allocate", missing)

    def asked(tried, up):
        return propose(PlanRequest(problem, problem.budget_ms, tried, up=up))

    assert asked([], up=False).counts == counts and asked([], up=False).floor
    assert asked([], up=True) is None  # smaller than one that met the budget
    assert asked([counts], up=True) is None
    with pytest.raises(SmallestMisses):
        asked([counts], up=False)


def test_the_gap_bounds_every_plan_of_the_latency(problem):
    """Against brute force over all widths: the best plan lies within the gap of the one found."""
    found = allocate(problem)
    gap = optimality_gap(problem, found.counts)
    assert gap.exact and 0 <= gap.share < 0.02
    span = sum(float(c.worth[-1] - c.worth[0]) for c in problem.choices)
    limit = problem.model.predict(found.counts)
    best = max(
        problem.worth(picks)
        for picks in np.ndindex(*(len(c.options) for c in problem.choices))
        if problem.model.predict(problem.counts(picks)) <= limit * (1 + 1e-9)
    )
    assert best <= worth(problem, found.counts) + gap.share * span + 1e-6


def test_the_gap_of_a_poor_plan_is_wide(problem):
    best = allocate(problem)
    poor = allocate(problem, "uniform")
    behind = worth(problem, best.counts) - worth(problem, poor.counts)
    span = sum(float(c.worth[-1] - c.worth[0]) for c in problem.choices)
    gap = optimality_gap(problem, poor.counts)
    if best.predicted_ms <= poor.predicted_ms:
        assert gap.share >= behind / span - 1e-9
    assert gap.share >= optimality_gap(problem, best.counts).share - 1e-9
