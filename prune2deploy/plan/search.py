"""Lagrangian search with coordinate moves: the fast way to allocate.

In: an evaluator. Out: the best feasible options found, and the curve of what every latency is
worth. Prices on the limits turn the constrained problem into a sequence of free ones (Everett,
1963); each is climbed one choice at a time, exact over all options of that choice. The best
price is bracketed on a logarithmic grid and bisected; exchanges between choices then use up what
the prices left of the budget. It finds local optima: the exact method is ``milp``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from prune2deploy.plan.choices import Floats, Ints
from prune2deploy.plan.evaluate import Evaluator

_GRID = 13  # prices tried before bisecting
_HALVINGS = 14
_SWEEPS = 12
_BALANCING = 6  # rounds of shifting weight between several limits
_EXCHANGES = 3


@dataclass
class Found:
    """The best feasible assignment so far, and every point passed on the way.

    Attributes:
        chosen: Options of the best feasible assignment, ``None`` while there is none.
        worth: Its objective.
        points: ``(cost against the first limit, objective)`` of local optima.
    """

    chosen: Ints | None = None
    worth: float = -np.inf
    points: list[tuple[float, float]] = field(default_factory=list)

    def offer(self, evaluator: Evaluator) -> bool:
        """Note the evaluator's present assignment; True when it is feasible."""
        worth = evaluator.problem.worth(evaluator.chosen.tolist())
        self.points.append((float(evaluator.totals[0]), worth))
        fits = evaluator.feasible()
        if fits and worth > self.worth:
            self.chosen, self.worth = evaluator.chosen.copy(), worth
        return fits


def search(evaluator: Evaluator) -> Found:
    """Maximise worth within the evaluator's limits."""
    found = Found()
    smallest(evaluator)
    found.offer(evaluator)
    weights = np.ones(len(evaluator.limits))
    rounds = 1 if len(evaluator.limits) == 1 else _BALANCING
    for _ in range(rounds):
        _bisect(evaluator, weights, found)
        use = evaluator.totals / evaluator.limits
        weights = weights * np.clip(use / use.mean(), 0.5, 2.0)
    if found.chosen is not None:
        evaluator.assign(found.chosen)
        exchange(evaluator, found)
    return found


def smallest(evaluator: Evaluator) -> None:
    """Move to a least-cost assignment (a local one: all least widths, then single moves)."""
    evaluator.assign([0] * len(evaluator.problem.choices))
    _climb(evaluator, np.full(len(evaluator.limits), np.inf))


def _bisect(evaluator: Evaluator, weights: Floats, found: Found) -> None:
    """Find the lowest price at which the climbed assignment is feasible."""
    worths = [c.worth for c in evaluator.problem.choices]
    scale = sum(float(w.max() - w.min()) for w in worths) or 1.0
    unit = scale * weights / evaluator.limits
    evaluator.assign([len(w) - 1 for w in worths])
    low, high = -6.0, 3.0  # natural powers of ten of the price
    last: Ints | None = None
    for power in np.linspace(low, high, _GRID):
        previous = evaluator.chosen.copy()
        _climb(evaluator, unit * 10.0**power)
        if found.offer(evaluator):
            high = float(power)
            last = previous
            break
        low = float(power)
    if last is None:
        return
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        evaluator.assign(last)
        _climb(evaluator, unit * 10.0**middle)
        if found.offer(evaluator):
            high = middle
        else:
            low, last = middle, evaluator.chosen.copy()


def _climb(evaluator: Evaluator, prices: Floats) -> None:
    """Coordinate ascent on worth minus priced cost; infinite prices mean cost alone."""
    choices = evaluator.problem.choices
    only_cost = bool(np.isinf(prices).any())
    weights = 1.0 / evaluator.limits if only_cost else prices
    pending = set(range(len(choices)))
    for _ in range(_SWEEPS):
        moved = False
        for g in sorted(pending):
            gain = -(weights @ evaluator.costs(g))
            if not only_cost:
                gain = gain + choices[g].worth
            best = int(np.argmax(gain))
            if gain[best] > gain[evaluator.chosen[g]] + 1e-12:
                evaluator.set(g, best)
                moved = True
        if not moved:
            return


def fill(evaluator: Evaluator) -> None:
    """Widen choices, best worth per cost first, while every limit is kept."""
    pending = list(range(len(evaluator.problem.choices)))
    while pending:
        moves = [(move, g) for g in pending if (move := _best_widening(evaluator, g)) is not None]
        moves.sort(key=lambda found: (-found[0][0], found[1]))
        pending = []  # costs only grow from here on: what does not fit now never will
        for place, (move, g) in enumerate(moves):
            now = move if place == 0 else _best_widening(evaluator, g)
            if now is not None:
                evaluator.set(g, now[1])
                pending.append(g)


def _best_widening(evaluator: Evaluator, g: int) -> tuple[float, int] | None:
    worth = evaluator.problem.choices[g].worth
    gain = worth - worth[evaluator.chosen[g]]
    if gain.max() <= 1e-12:
        return None
    costs = evaluator.costs(g)
    fits = (costs <= evaluator.limits[:, None]).all(axis=0) & (gain > 1e-12)
    if not fits.any():
        return None
    extra = ((costs - evaluator.totals[:, None]) / evaluator.limits[:, None]).max(axis=0)
    rate = np.where(fits, gain / np.maximum(extra, 1e-9), -np.inf)
    return float(rate.max()), int(np.argmax(rate))


def exchange(evaluator: Evaluator, found: Found) -> None:
    """Use up the slack, then give one choice a step less and spend it elsewhere, while it pays."""
    fill(evaluator)
    found.offer(evaluator)
    steps: tuple[Callable[[int, int], int], ...] = (lambda o, _: o - 1, lambda o, n: min(o + 1, n))
    for _ in range(_EXCHANGES):
        before = found.worth
        for g in range(len(evaluator.problem.choices)):
            for step in steps:
                _try(evaluator, found, g, step)
        if found.worth <= before + 1e-12:
            return


def _try(evaluator: Evaluator, found: Found, g: int, step: Callable[[int, int], int]) -> None:
    start = found.chosen
    assert start is not None
    last = len(evaluator.problem.choices[g].options) - 1
    option = step(int(start[g]), last)
    if option < 0 or option == start[g]:
        return
    evaluator.assign(start)
    evaluator.set(g, option)
    if not evaluator.feasible():
        _repair(evaluator, keep=g)
    fill(evaluator)
    found.offer(evaluator)


def _repair(evaluator: Evaluator, keep: int) -> None:
    """Narrow the one other choice that loses least worth while restoring the limits."""
    best: tuple[float, int, int] | None = None
    for g, choice in enumerate(evaluator.problem.choices):
        if g == keep:
            continue
        fits = (evaluator.costs(g) <= evaluator.limits[:, None]).all(axis=0)
        if fits.any():
            worth = np.where(fits, choice.worth, -np.inf) - choice.worth[evaluator.chosen[g]]
            option = int(np.argmax(worth))
            if best is None or worth[option] > best[0]:
                best = (float(worth[option]), g, option)
    if best is not None:
        evaluator.set(best[1], best[2])
