"""Simpler ways to allocate, by name, to compare with.

``uniform`` keeps the same fraction everywhere; ``global`` keeps what exceeds one threshold over
all scores (here: over the worth of the next channel); ``greedy`` narrows, step by step, the choice
that loses least worth per millisecond saved. Each returns the widest assignment of its kind that
keeps the limits, on the same grid as the others, and keeps every block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from prune2deploy.plan.choices import Ints
from prune2deploy.plan.evaluate import Evaluator

_DENSE = 400  # ratios tried; latency is not monotone in the ratio, so bisection would miss some


def uniform(evaluator: Evaluator) -> Ints | None:
    """The largest common kept fraction, each width rounded to the nearest option."""
    best: Ints | None = None
    for fraction in np.linspace(0.0, 1.0, _DENSE):
        chosen = [
            int(np.argmin(np.abs(c.options - fraction * c.size))) for c in evaluator.problem.choices
        ]
        evaluator.assign(chosen)
        if evaluator.feasible():
            best = evaluator.chosen.copy()
    return best


def threshold(evaluator: Evaluator) -> Ints | None:
    """The lowest common threshold on what the last channel kept is worth."""
    marginal = [
        np.diff(np.maximum.accumulate(c.worth)) / np.diff(c.options)
        for c in evaluator.problem.choices
    ]
    levels = np.unique(np.concatenate([*marginal, [0.0]]))
    best: Ints | None = None
    for level in levels[np.unique(np.linspace(0, len(levels) - 1, _DENSE).astype(int))][::-1]:
        evaluator.assign([int((step > level).sum()) for step in marginal])
        if evaluator.feasible():
            best = evaluator.chosen.copy()
    return best


def greedy(evaluator: Evaluator) -> Ints | None:
    """From full width, one step at a time, least worth lost per cost saved."""
    choices = evaluator.problem.choices
    evaluator.assign([len(c.options) - 1 for c in choices])
    while not evaluator.feasible():
        best: tuple[float, int] | None = None
        over = (evaluator.totals > evaluator.limits) / evaluator.limits
        for g, choice in enumerate(choices):
            option = int(evaluator.chosen[g])
            if option == 0:
                continue
            costs = over @ evaluator.costs(g)
            saved = max(float(costs[option] - costs[option - 1]), 1e-12)
            lost = float(choice.worth[option] - choice.worth[option - 1])
            if best is None or lost / saved < best[0]:
                best = (lost / saved, g)
        if best is None:
            return None
        evaluator.set(best[1], int(evaluator.chosen[best[1]]) - 1)
    return np.array(evaluator.chosen, dtype=np.int64)


BASELINES: Mapping[str, Callable[[Evaluator], Ints | None]] = {
    "uniform": uniform,
    "global": threshold,
    "greedy": greedy,
}
