"""Plans near the worthiest one that use more of the budget than it does.

In: a problem, its allocation, and how much of the budget is to be used at least. Out: plans that
do, and are worth nearly as much, the worthiest first.

Wide steps of costly axes can leave a gap below the budget that no worthier plan fills. What an
objective tells apart by so little is better spent: two choices at a time are given other widths,
all options of the second seen at once.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from prune2deploy.plan.allocate import Allocation
from prune2deploy.plan.choices import Problem
from prune2deploy.plan.evaluate import Evaluator

NEAR = 0.03  # of what widths are worth in all: how much worse a plan nearly as good may be
_REACH = 2  # options that the first of the two choices may move
_MOST = 8  # plans that are given back


def fuller(problem: Problem, found: Allocation, least_ms: float) -> list[Allocation]:
    """Plans that differ from ``found`` in one or two choices and take at least ``least_ms``.

    Args:
        problem: Without blocks that may go; its budget and caps hold.
        found: An allocation of it.
        least_ms: Predicted latency that a plan has to take.
    """
    evaluator = Evaluator(problem)
    start = np.array(
        [int(np.searchsorted(c.options, found.counts[c.axes[0]])) for c in problem.choices]
    )
    narrowest, widest = problem.ends
    enough = found.objective - NEAR * (widest - narrowest)
    least = problem.model.operator_budget_ms(least_ms)
    seen: dict[tuple[int, ...], float] = {}
    for first, choice in enumerate(problem.choices):
        low, high = max(0, start[first] - _REACH), start[first] + _REACH + 1
        for option in range(low, min(high, len(choice.options))):
            evaluator.assign(start)
            evaluator.set(first, option)
            seen.update(_seconds(evaluator, first, least))
    good = {picks: worth for picks, worth in seen.items() if worth >= enough}
    best = heapq.nlargest(_MOST, good, key=good.__getitem__)
    return [
        replace(
            found,
            counts=problem.counts(picks),
            predicted_ms=problem.predict(picks),
            objective=problem.worth(picks),
        )
        for picks in best
        if picks != tuple(start)
    ]


def _seconds(
    evaluator: Evaluator, first: int, least: float
) -> Iterator[tuple[tuple[int, ...], float]]:
    """The present assignment with the best option of each other choice that uses enough."""
    present, worth = evaluator.chosen.tolist(), evaluator.worth
    for second, worths in enumerate(evaluator.worths):
        if second == first:
            continue
        costs = evaluator.costs(second)
        fits = (costs <= evaluator.limits[:, None] + 1e-9).all(axis=0) & (costs[0] >= least)
        if fits.any():
            option = int(np.argmax(np.where(fits, worths, -np.inf)))
            picks = (*present[:second], option, *present[second + 1 :])
            yield picks, worth + float(worths[option] - worths[present[second]])
