"""Choose the kept channels of every axis so that the predicted latency keeps the budget.

In: a problem (choices, latency model, budget, caps, blocks that may go). Out: an allocation, i.e.
counts per axis and blocks to take out with their predicted latency and objective; then, with
scores, a plan of channels.

``lagrangian`` searches with prices and exchanges (a second or two), ``milp`` proves its result,
``uniform``, ``global`` and ``greedy`` are there to compare with: they keep every block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import PlanError
from prune2deploy.graph.axes import Counts, Graph
from prune2deploy.plan.baselines import BASELINES
from prune2deploy.plan.choices import Choice, Ints, Problem
from prune2deploy.plan.evaluate import Evaluator
from prune2deploy.plan.milp import solve
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.search import Found, search, smallest
from prune2deploy.plan.terms import Flags

GAP_SECONDS = 10.0  # that bounding the gap of a plan may take
METHODS = ("lagrangian", "milp", *BASELINES)

Curve = tuple[tuple[float, float], ...]
"""``((predicted milliseconds, objective), ...)``, both ascending."""


@dataclass(frozen=True)
class Allocation:
    """Kept channels per axis, and what goes whole.

    Attributes:
        counts: Kept channels of every axis that may be pruned and does not go with a block.
        predicted_ms: Predicted latency of the whole model.
        objective: Summed worth.
        curve: What other latencies are worth, as found on the way.
        removed: Blocks to take out.
    """

    counts: Mapping[str, int]
    predicted_ms: float
    objective: float
    curve: Curve
    removed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gap:
    """How much more than a plan other widths of its predicted latency could keep at most.

    Attributes:
        share: Of what widths are worth: 1 is the span from the narrowest to the full ones.
        exact: False where operators had to be approximated or options left out, so that it is
            an estimate and no bound.
    """

    share: float
    exact: bool


class SmallestMisses(PlanError):  # noqa: N818  reads as the verdict it is
    """Even the narrowest widths, without all removable blocks, are predicted to miss the budget.

    Only a measurement can tell whether they do, so the search deals with it.

    Attributes:
        floor_ms: Predicted latency of the fastest plan found.
        counts: Its widths.
    """

    def __init__(self, problem: Problem, chosen: Ints, kept: Flags) -> None:
        picks, flags = chosen.tolist(), kept.tolist()
        self.floor_ms = problem.predict(picks, flags)
        self.counts = problem.counts(picks, flags)
        super().__init__(
            f"the smallest plan is predicted to take {self.floor_ms:.4g} ms, expected at most "
            f"{problem.budget_ms:.4g} ms; raise the budget or allow narrower layers"
        )


class CapTooTightError(PlanError):
    """Even the least widths have more parameters or multiply-accumulates than a cap allows."""


def allocate(problem: Problem, method: str = "lagrangian", *, seconds: float = 20.0) -> Allocation:
    """Choose kept channels.

    Args:
        problem: Choices, latency model, budget and caps.
        method: One of ``METHODS``.
        seconds: Time limit of the exact solver.

    Raises:
        SmallestMisses: The budget cannot be kept.
        PlanError: A cap cannot be kept, the method is unknown or cannot take out blocks that have
            to go, more of them have to than may, or there is nothing to choose.
    """
    _require(problem, method)
    evaluator = Evaluator(problem)
    _require_floor(problem, evaluator)
    if method in BASELINES:
        chosen = BASELINES[method](evaluator)
        if chosen is None:
            evaluator.assign([0] * len(problem.choices))
            raise SmallestMisses(problem, evaluator.chosen, evaluator.kept)
        evaluator.assign(chosen)
        found = Found()
        found.offer(evaluator)
        return _result(problem, found)
    found = search(evaluator)
    if found.chosen is None:
        raise SmallestMisses(problem, evaluator.chosen, evaluator.kept)
    if method == "milp":
        _exact(evaluator, found, seconds)
    return _result(problem, found)


def optimality_gap(problem: Problem, counts: Counts) -> Gap | None:
    """Bound what the best plan of the same predicted latency could keep beyond this one.

    Args:
        problem: Its caps hold; its budget does not matter. No block of it may go.
        counts: The plan; its widths must be among the options.

    Returns:
        ``None`` where the solver found no bound within ``GAP_SECONDS``.
    """
    picks = [
        int(np.searchsorted(c.options, counts.get(c.axes[0], c.size))) for c in problem.choices
    ]
    same = replace(problem, budget_ms=problem.predict(picks))
    evaluator = Evaluator(same)
    evaluator.assign(picks)
    solved = solve(evaluator, seconds=GAP_SECONDS)
    if not np.isfinite(solved.bound):
        return None
    least, most = problem.ends
    more = max(0.0, solved.bound - evaluator.worth) / max(most - least, 1e-12)
    return Gap(more, exact=solved.exact)


def channels(graph: Graph, scores: Mapping[str, npt.ArrayLike], counts: Counts) -> Plan:
    """The plan that keeps the best channels of every axis.

    Args:
        graph: The traced model.
        scores: Axis name to one score per channel, float (size,); higher is kept. Among equal
            scores the lower channel number is kept.
        counts: Kept channels per axis.

    Raises:
        PlanError: Scores are missing for an axis that loses channels, or the plan does not fit.
    """
    kept = {}
    for name, count in counts.items():
        size = graph[name].size
        if count >= size:
            continue
        if name not in scores:
            raise PlanError(
                f"axis {name!r} is to keep {count} of {size} channels but has no scores"
            )
        values = np.asarray(scores[name], dtype=np.float64)
        if values.shape != (size,):
            raise PlanError(f"scores of {name!r} have shape {values.shape}, expected ({size},)")
        order = np.argsort(-values, kind="stable")
        kept[name] = tuple(sorted(int(i) for i in order[:count]))
    plan = Plan(kept)
    plan.check(graph)
    return plan


def _require(problem: Problem, method: str) -> None:
    """Check that there is something to do, and that the method can do it."""
    if method not in METHODS:
        raise PlanError(f"unknown method {method!r}; choose from {', '.join(METHODS)}")
    least, most = problem.least_removed, len(problem.blocks)
    if not problem.choices and not most:
        raise PlanError("nothing to allocate: every axis is frozen or has a single allowed width")
    if least > most:
        raise PlanError(f"{least} blocks have to go, but only {most} may; offer more of them")
    if least and method in BASELINES:
        raise PlanError(
            f"{least} blocks have to go, but method {method!r} keeps every block; "
            "choose lagrangian or milp"
        )


def over_caps(
    graph: Graph, counts: Counts, max_params: int | None, max_macs: int | None
) -> list[tuple[str, int, int]]:
    """The caps that some widths do not keep: of what, the cap, and what there is instead."""
    caps = (
        ("parameters", max_params, graph.params(counts)),
        ("multiply-accumulates", max_macs, graph.macs(counts)),
    )
    return [(what, cap, has) for what, cap, has in caps if cap is not None and has > cap]


def require_caps(
    graph: Graph, offered: Sequence[Choice], max_params: int | None, max_macs: int | None
) -> None:
    """Check that the narrowest widths keep the caps.

    Args:
        graph: The model, without the blocks that may go.
        offered: The widths allowed.
        max_params: Upper limit of the number of parameters, if any.
        max_macs: Upper limit of the multiply-accumulates, if any.

    Raises:
        CapTooTightError: They do not.
    """
    counts = {axis: int(choice.options[0]) for choice in offered for axis in choice.axes}
    for what, cap, least in over_caps(graph, counts, max_params, max_macs):
        raise CapTooTightError(
            f"a cap of {cap} {what} was asked for, but the narrowest allowed plan has "
            f"{least}; raise the cap or allow narrower layers"
        )


def _require_floor(problem: Problem, evaluator: Evaluator) -> None:
    left = problem.graph.without([block.name for block in problem.blocks])
    require_caps(left, problem.choices, problem.max_params, problem.max_macs)
    smallest(evaluator)
    if evaluator.totals[0] > evaluator.limits[0] + 1e-9:
        raise SmallestMisses(problem, evaluator.chosen, evaluator.kept)


def _exact(evaluator: Evaluator, found: Found, seconds: float) -> None:
    """Add to ``found`` what the exact method makes of it."""
    found.restore(evaluator)
    solved = solve(evaluator, seconds=seconds)
    if solved.chosen is not None:
        evaluator.assign(solved.chosen, solved.kept)
        found.offer(evaluator)


def _result(problem: Problem, found: Found) -> Allocation:
    assert found.chosen is not None
    picks, kept = found.chosen.tolist(), found.kept.tolist()
    here = (problem.predict(picks, kept), problem.worth(picks, kept))
    curve = [(ms + problem.model.offset_ms(ms), worth) for ms, worth in found.points]
    removed = tuple(block.name for block in problem.without(kept))
    counts = problem.counts(picks, kept)
    rising = _rising([*curve, here])
    return Allocation(counts, *here, rising, removed=removed)


def _rising(points: list[tuple[float, float]]) -> Curve:
    """The Pareto front: points that no other beats in both latency and worth."""
    best: list[tuple[float, float]] = []
    for ms, worth in sorted(points, key=lambda p: (p[0], -p[1])):
        if not best or worth > best[-1][1] + 1e-12:
            best.append((ms, worth))
    return tuple(best)
