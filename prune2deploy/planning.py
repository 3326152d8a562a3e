"""Which widths to build next: allocation with what was tried, missed and met so far in mind.

In: a :class:`Question` (the problem, where to aim, plans tried before). Out: :class:`Wanted`, or
``None`` where nothing else is worth a build. Plain arithmetic on predictions.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from prune2deploy.config import FILL
from prune2deploy.graph.axes import Graph
from prune2deploy.plan.allocate import Allocation, Curve, SmallestMisses, allocate
from prune2deploy.plan.choices import Problem

NUDGES = 12  # times that the aim is moved to find a plan that was not tried before
NUDGE = 0.005
POINTS = 40  # of a curve, about
HELD = 6  # axes held wider in turn to fill a budget


@dataclass(frozen=True)
class Wanted:
    """Counts to try next, as the journal keeps them.

    Attributes:
        counts: Kept channels per axis.
        predicted_ms: Predicted latency in baseline milliseconds.
        floor: Whether it is the smallest plan there is.
        curve: ``((predicted milliseconds, retained worth), ...)`` of plans that were considered;
            0 is the worth of the narrowest widths, 1 that of the full ones.
    """

    counts: Mapping[str, int]
    predicted_ms: float
    floor: bool = False
    curve: Curve = ()


@dataclass(frozen=True, eq=False)
class Question:
    """What the next plan has to answer.

    Attributes:
        problem: Its budget is the limit of the median, in baseline milliseconds.
        aim_ms: Where to aim below that, so that the measured interval will fit.
        tried: Counts of the plans measured so far, without the axes that keep all.
        up: Whether the last one met the budget, so that the next may be larger.
    """

    problem: Problem
    aim_ms: float
    tried: Sequence[Mapping[str, int]]
    up: bool


def propose(question: Question) -> Wanted | None:
    """The best plan that was not tried; ``None`` when there is no other worth a build.

    Raises:
        PlanError: A cap on parameters or multiply-accumulates cannot be kept.
    """
    whole, aim_ms = question.problem, question.aim_ms
    for _ in range(NUDGES):
        if whole.model.operator_budget_ms(aim_ms) <= 0:  # what no operator takes is too long
            return _untried(question, smallest(whole))
        problem = replace(whole, budget_ms=aim_ms)
        try:
            found = allocate(problem)
        except SmallestMisses as floor:
            return _untried(question, Wanted(floor.counts, floor.floor_ms, floor=True))
        if question.up and found.predicted_ms < FILL * whole.budget_ms:
            near = fuller(problem, found)
            enough = [plan for plan in near if plan.predicted_ms >= FILL * whole.budget_ms]
            if enough:
                found = max(enough, key=lambda plan: plan.objective)
        wanted = Wanted(found.counts, found.predicted_ms, curve=retained(problem, found.curve))
        if _untried(question, wanted):
            return wanted
        aim_ms *= 1 + NUDGE if question.up else 1 - NUDGE
        if aim_ms > whole.budget_ms:
            return None
    return None


def retained(problem: Problem, curve: Curve) -> Curve:
    """A curve of objectives as shares of what the full widths are worth beyond the narrowest."""
    least = problem.worth([0] * len(problem.choices))
    most = problem.worth([len(choice.options) - 1 for choice in problem.choices])
    span = max(most - least, 1e-12)
    steps = max(1, len(curve) // POINTS)
    return tuple((at, (worth - least) / span) for at, worth in (*curve[:-1:steps], *curve[-1:]))


def smallest(problem: Problem) -> Wanted:
    """The narrowest width of every choice."""
    counts = problem.counts([0] * len(problem.choices))
    return Wanted(counts, problem.model.predict(counts), floor=True)


def pruned(graph: Graph, counts: Mapping[str, int]) -> dict[str, int]:
    """Only the axes that lose channels, as plans name them."""
    return {name: count for name, count in counts.items() if count < graph[name].size}


def _untried(question: Question, wanted: Wanted) -> Wanted | None:
    return None if pruned(question.problem.graph, wanted.counts) in question.tried else wanted


def fuller(problem: Problem, found: Allocation) -> list[Allocation]:
    """Plans near the worthiest one that use more of the budget than it does.

    Wide steps of one costly axis can leave a gap below the budget that no worthier plan fills.
    Each of the costliest axes is therefore held one step wider in turn, and the others give way.
    """
    steps = []
    for number, choice in enumerate(problem.choices):
        wider = choice.options > found.counts[choice.axes[0]]
        if wider.any():
            width = int(choice.options[wider][0])
            cost = problem.model.predict({**found.counts, **dict.fromkeys(choice.axes, width)})
            steps.append((cost, number, wider))
    plans = []
    for _, number, wider in sorted(steps, key=lambda s: -s[0])[:HELD]:
        held = list(problem.choices)
        choice = held[number]
        held[number] = replace(choice, options=choice.options[wider], worth=choice.worth[wider])
        with contextlib.suppress(SmallestMisses):
            plans.append(allocate(replace(problem, choices=tuple(held))))
    return [plan for plan in plans if plan.predicted_ms > found.predicted_ms]
