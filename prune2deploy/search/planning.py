"""Which widths to build next: allocation with what was tried, missed and met so far in mind.

In: a :class:`PlanRequest` (the problem, where to aim, plans tried before). Out: a
:class:`Proposal`, or ``None`` where nothing else is worth a build. Plain arithmetic on predictions.

The objective adds up what each axis is worth alone, so plans of nearly the same objective may
differ in what their widths are worth together. Where the request can measure that (``rank``),
several such plans are compared by it, which costs no build.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prune2deploy.config import FILL
from prune2deploy.graph.axes import Graph
from prune2deploy.plan.allocate import Allocation, CapTooTightError, Curve, SmallestMisses, allocate
from prune2deploy.plan.choices import Choice, Problem
from prune2deploy.plan.filling import NEAR, fuller

Flags = npt.NDArray[np.bool_]

NUDGES = 12  # times that the aim is moved to find a plan that was not tried before
NUDGE = 0.005
POINTS = 40  # of a curve, about
HELD = 6  # axes moved in turn to find plans nearly as good


@dataclass(frozen=True)
class Proposal:
    """Counts to try next, as the journal keeps them.

    Attributes:
        counts: Kept channels per axis.
        predicted_ms: Predicted latency in baseline milliseconds.
        floor: Whether it is the smallest plan there is.
        curve: ``((predicted milliseconds, retained worth), ...)`` of plans that were considered;
            0 is the worth of the narrowest widths, 1 that of the full ones.
        ranked: How many plans of nearly equal objective it was the best of.
    """

    counts: Mapping[str, int]
    predicted_ms: float
    floor: bool = False
    curve: Curve = ()
    ranked: int = 1


@dataclass(frozen=True, eq=False)
class PlanRequest:
    """What is asked of the next plan.

    Attributes:
        problem: Its budget is the limit of the median, in baseline milliseconds.
        aim_ms: Where to aim below that, so that the measured interval will fit.
        tried: Counts of the plans measured so far, without the axes that keep all.
        up: Whether one of them met the budget, so that only larger ones are worth a build.
        rank: What widths lose together, e.g. the measured loss of the model that has them; lower
            is better. ``None`` leaves the decision to the objective.
    """

    problem: Problem
    aim_ms: float
    tried: Sequence[Mapping[str, int]]
    up: bool
    rank: Callable[[Mapping[str, int]], float] | None = None

    def was_tried(self, counts: Mapping[str, int]) -> bool:
        """Whether a plan of these counts was measured."""
        return pruned(self.problem.graph, counts) in self.tried


def propose(request: PlanRequest) -> Proposal | None:
    """The best plan that was not tried; ``None`` when there is no other worth a build.

    Raises:
        SmallestMisses: Every plan is predicted to miss the budget, and the smallest was tried.
        PlanError: A cap on parameters or multiply-accumulates cannot be kept.
    """
    whole, aim_ms = request.problem, request.aim_ms
    floor = smallest(whole)
    for _ in range(NUDGES):
        # only blocks could go, or what no operator takes is too long already
        if not whole.choices or whole.model.operator_budget_ms(aim_ms) <= 0:
            return None if request.was_tried(floor.counts) else floor
        problem = replace(whole, budget_ms=aim_ms)
        try:
            found = allocate(problem)
        except SmallestMisses as missed:
            if request.up:
                return None
            if request.was_tried(missed.counts):
                raise
            return Proposal(missed.counts, missed.floor_ms, floor=True)
        proposal = _best(request, problem, found, floor)
        if not request.was_tried(proposal.counts):
            return proposal
        aim_ms *= 1 + NUDGE if request.up else 1 - NUDGE
        if aim_ms > whole.budget_ms:
            return None
    return None


def _best(request: PlanRequest, problem: Problem, found: Allocation, floor: Proposal) -> Proposal:
    """Of the plans nearly as good as ``found`` that of least loss; ``found`` without losses."""
    among, rank = _among(request, problem, found), request.rank
    best = among[0] if rank is None else min(among, key=lambda plan: rank(plan.counts))
    return Proposal(
        best.counts,
        best.predicted_ms,
        floor=best.counts == floor.counts,
        curve=retained(problem, found.curve),
        ranked=1 if rank is None else len(among),
    )


def _among(request: PlanRequest, problem: Problem, found: Allocation) -> list[Allocation]:
    """The plans to choose from, the worthiest first: never empty, tried ones only if all are."""
    whole, plans = request.problem, [found]
    if found.predicted_ms < FILL * whole.budget_ms:
        plans = fuller(problem, found, FILL * whole.budget_ms) or plans
    if request.rank is not None:
        filled = min(FILL * problem.budget_ms, plans[0].predicted_ms)
        plans += [p for p in near(problem, plans[0]) if p.predicted_ms >= filled]
    return [p for p in plans if not request.was_tried(p.counts)] or plans[:1]


def retained(problem: Problem, curve: Curve) -> Curve:
    """A curve of objectives as shares of what the full widths are worth beyond the narrowest."""
    least, most = problem.ends
    span = max(most - least, 1e-12)
    steps = max(1, len(curve) // POINTS)
    return tuple((at, (worth - least) / span) for at, worth in (*curve[:-1:steps], *curve[-1:]))


def smallest(problem: Problem) -> Proposal:
    """The narrowest width of every choice."""
    counts = problem.counts([0] * len(problem.choices))
    return Proposal(counts, problem.model.predict(counts), floor=True)


def pruned(graph: Graph, counts: Mapping[str, int]) -> dict[str, int]:
    """Only the axes that lose channels, as plans name them."""
    return {name: count for name, count in counts.items() if count < graph[name].size}


def near(problem: Problem, found: Allocation) -> list[Allocation]:
    """Other plans of nearly the same objective, the worthiest first.

    Each of the costliest axes is kept in turn from the width that it has in ``found``, once to
    the wider and once to the narrower side, and the others are allocated anew.
    """
    least, most = problem.ends
    enough = found.objective - NEAR * (most - least)
    plans: list[Allocation] = []
    for number, choice in _costliest(problem, found):
        width = found.counts[choice.axes[0]]
        for allowed in (choice.options > width, choice.options < width):
            plans += _with_options(problem, number, allowed)
    distinct = {tuple(sorted(p.counts.items())): p for p in plans if p.objective >= enough}
    distinct.pop(tuple(sorted(found.counts.items())), None)
    return sorted(distinct.values(), key=lambda plan: -plan.objective)[:HELD]


def _costliest(problem: Problem, found: Allocation) -> list[tuple[int, Choice]]:
    """The choices of which one step more costs most time, with their numbers."""
    steps = []
    for number, choice in enumerate(problem.choices):
        wider = choice.options[choice.options > found.counts[choice.axes[0]]]
        if wider.size:
            more = dict.fromkeys(choice.axes, int(wider[0]))
            steps.append((problem.model.predict({**found.counts, **more}), number, choice))
    return [(number, choice) for _, number, choice in sorted(steps, key=lambda s: -s[0])[:HELD]]


def _with_options(problem: Problem, number: int, allowed: Flags) -> list[Allocation]:
    """The best plan where one choice may take some of its options only; none if none is left."""
    if not allowed.any():
        return []
    held = list(problem.choices)
    choice = held[number]
    held[number] = choice.among(allowed)
    with contextlib.suppress(SmallestMisses, CapTooTightError):
        return [allocate(replace(problem, choices=tuple(held)))]
    return []
