"""Lagrangian search with coordinate moves: the fast way to allocate.

In: an evaluator. Out: the best feasible options found, and the curve of what every latency is
worth. Prices on the limits turn the constrained problem into a sequence of free ones (Everett,
1963); each is climbed one choice at a time, exact over all options of that choice. The best
price is bracketed on a logarithmic grid and bisected; exchanges between choices then use up what
the prices left of the budget. It finds local optima: the exact method is ``milp``.

At given prices the best widths inside a block do not depend on whether it is there. So those of
blocks that are out are climbed too, and a block is there where its worth exceeds its cost at
the widths it would have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from prune2deploy.plan.choices import Floats, Ints
from prune2deploy.plan.evaluate import Evaluator
from prune2deploy.plan.terms import Flags

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
        kept: Which blocks it keeps, bool array.
        worth: Its objective.
        points: ``(cost against the first limit, objective)`` of local optima.
    """

    chosen: Ints | None = None
    kept: Flags = field(default_factory=lambda: np.ones(0, dtype=bool))
    worth: float = -np.inf
    points: list[tuple[float, float]] = field(default_factory=list)

    def offer(self, evaluator: Evaluator) -> bool:
        """Note the evaluator's present assignment; True when it is feasible."""
        worth = evaluator.worth
        self.points.append((float(evaluator.totals[0]), worth))
        fits = evaluator.feasible()
        if fits and worth > self.worth:
            self.chosen, self.kept = evaluator.chosen.copy(), evaluator.kept.copy()
            self.worth = worth
        return fits

    def restore(self, evaluator: Evaluator) -> None:
        """Give the evaluator the best feasible assignment."""
        assert self.chosen is not None
        evaluator.assign(self.chosen, self.kept)


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
        found.restore(evaluator)
        exchange(evaluator, found)
    return found


def smallest(evaluator: Evaluator) -> None:
    """Move to a least-cost assignment (a local one: all least widths, then single moves).

    Every block that costs anything is out.
    """
    evaluator.assign([0] * len(evaluator.problem.choices))
    _climb(evaluator, np.full(len(evaluator.limits), np.inf))


def _bisect(evaluator: Evaluator, weights: Floats, found: Found) -> None:
    """Find the lowest price at which the climbed assignment is feasible."""
    scale = _scale(evaluator)
    unit = scale * weights / evaluator.limits
    evaluator.assign([len(c.options) - 1 for c in evaluator.problem.choices])
    low, high = -6.0, 3.0  # natural powers of ten of the price
    last: tuple[Ints, Flags] | None = None
    for power in np.linspace(low, high, _GRID):
        previous = evaluator.chosen.copy(), evaluator.kept.copy()
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
        evaluator.assign(*last)
        _climb(evaluator, unit * 10.0**middle)
        if found.offer(evaluator):
            high = middle
        else:
            low, last = middle, (evaluator.chosen.copy(), evaluator.kept.copy())


def _scale(evaluator: Evaluator) -> float:
    """What there is to lose: the span of every choice, and what blocks are worth themselves."""
    problem = evaluator.problem
    spans = sum(float(c.worth.max() - c.worth.min()) for c in problem.choices)
    return spans + sum(abs(block.loss) for block in problem.blocks) or 1.0


def _climb(evaluator: Evaluator, prices: Floats) -> None:
    """Coordinate ascent on worth minus priced cost; infinite prices mean cost alone."""
    choices = evaluator.problem.choices
    only_cost = bool(np.isinf(prices).any())
    weights = 1.0 / evaluator.limits if only_cost else prices
    for _ in range(_SWEEPS):
        moved = False
        for g, choice in enumerate(choices):
            idle = evaluator.idle(g)
            gain = -(weights @ evaluator.costs(g, whole=idle))
            if not only_cost:
                gain = gain + (choice.worth if idle else evaluator.worths[g])
            best = int(np.argmax(gain))
            if gain[best] > gain[evaluator.chosen[g]] + 1e-12:
                evaluator.set(g, best)
                moved = True
        moved = _flip_what_pays(evaluator, weights, 0.0 if only_cost else 1.0) or moved
        if not moved:
            return


def _flip_what_pays(evaluator: Evaluator, prices: Floats, per_worth: float) -> bool:
    """Take out the blocks that cost more than they are worth, and bring back the others.

    As many as have to go are out in any case: those that are missed least.
    """
    gains = []
    for block, kept in enumerate(evaluator.kept):
        worth, costs = evaluator.flipped(block)
        gain = per_worth * worth - float(prices @ costs)
        gains.append(gain - 1e-12 if kept else 1e-12 - gain)  # what its absence is worth
    order = np.argsort(-np.array(gains), kind="stable").tolist()
    moved = False
    for place, block in enumerate(order):
        stays = place >= evaluator.problem.least_removed and gains[block] <= 0
        if stays != evaluator.kept[block]:
            evaluator.flip(block)
            moved = True
    return moved


def fill(evaluator: Evaluator) -> None:
    """Widen choices and bring blocks back, best worth per cost first, within every limit."""
    pending = list(range(len(evaluator.problem.choices)))
    absent = np.flatnonzero(~evaluator.kept).tolist()
    while pending or absent:
        back = _best_return(evaluator, absent)
        moves = [(move, g) for g in pending if (move := _best_widening(evaluator, g)) is not None]
        moves.sort(key=lambda found: (-found[0][0], found[1]))
        if back is not None and (not moves or back[0] >= moves[0][0][0]):
            evaluator.flip(back[1])
            absent.remove(back[1])
            pending = sorted({*pending, *evaluator.members[back[1]]})
            continue
        pending = []  # costs only grow from here on: what does not fit now never will
        for place, (move, g) in enumerate(moves):
            now = move if place == 0 else _best_widening(evaluator, g)
            if now is not None:
                evaluator.set(g, now[1])
                pending.append(g)
        if not moves:
            return


def _best_return(evaluator: Evaluator, absent: list[int]) -> tuple[float, int] | None:
    """The block that is worth most per cost among those that may come back, if one fits."""
    best: tuple[float, int] | None = None
    for block in absent if evaluator.spare > 0 else ():
        worth, costs = evaluator.flipped(block)
        fits = bool((evaluator.totals + costs <= evaluator.limits).all())
        rate = worth / max(float((costs / evaluator.limits).max()), 1e-9)
        if fits and worth > 1e-12 and (best is None or rate > best[0]):
            best = (rate, block)
    return best


def _best_widening(evaluator: Evaluator, g: int) -> tuple[float, int] | None:
    worth = evaluator.worths[g]
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
    """Use up the slack, then give one choice a step less and spend it elsewhere, while it pays.

    Likewise with a block less, or with one more that the others make room for.
    """
    fill(evaluator)
    found.offer(evaluator)
    for _ in range(_EXCHANGES):
        before = found.worth
        for g in range(len(evaluator.problem.choices)):
            for step in (-1, 1):
                _try(evaluator, found, g, step)
        for block in range(len(evaluator.problem.blocks)):
            _try_block(evaluator, found, block)
        if found.worth <= before + 1e-12:
            return


def _try(evaluator: Evaluator, found: Found, g: int, step: int) -> None:
    """Move one choice by a step, narrow another where a limit is exceeded, and fill up."""
    assert found.chosen is not None
    option = int(found.chosen[g]) + step
    if not 0 <= option < len(evaluator.problem.choices[g].options):
        return
    found.restore(evaluator)
    if evaluator.idle(g):
        return
    evaluator.set(g, option)
    if not evaluator.feasible():
        _repair(evaluator, keep=g)
    fill(evaluator)
    found.offer(evaluator)


def _try_block(evaluator: Evaluator, found: Found, block: int) -> None:
    """Take a block out or bring it back, with the widths that there are and from the narrowest."""
    start, kept = found.chosen, found.kept
    assert start is not None
    for chosen in (start, np.zeros_like(start)):
        evaluator.assign(chosen, kept)
        evaluator.flip(block)
        for _ in evaluator.kept:
            if evaluator.feasible() or _repair(evaluator, keep_block=block):
                break
            _give_up(evaluator, keep_block=block)
        fill(evaluator)
        found.offer(evaluator)


def _give_up(evaluator: Evaluator, *, keep_block: int) -> None:
    """Take out the other block that is missed least for what it costs, if one is left."""
    rates = []
    for block in np.flatnonzero(evaluator.kept).tolist():
        if block != keep_block:
            worth, costs = evaluator.flipped(block)
            saved = float((-costs / evaluator.limits).max())
            rates.append((worth / max(saved, 1e-9), block))
    if rates:
        evaluator.flip(max(rates)[1])


def _repair(evaluator: Evaluator, *, keep: int = -1, keep_block: int = -1) -> bool:
    """Narrow the one other choice, or take out the one other block, that is missed least.

    Such a move restores the limits, and with them the number of blocks that have to be out.
    False, and nothing done, where there is none.
    """
    moves: list[tuple[float, Callable[[], None]]] = []
    for g, worths in enumerate(evaluator.worths) if evaluator.spare >= 0 else ():
        if g == keep or evaluator.idle(g):
            continue
        fits = (evaluator.costs(g) <= evaluator.limits[:, None]).all(axis=0)
        if fits.any():
            worth = np.where(fits, worths, -np.inf) - worths[evaluator.chosen[g]]
            option = int(np.argmax(worth))
            moves.append((float(worth[option]), partial(evaluator.set, g, option)))
    for block in np.flatnonzero(evaluator.kept).tolist() if evaluator.spare >= -1 else ():
        worth_change, costs = evaluator.flipped(block)
        if block != keep_block and (evaluator.totals + costs <= evaluator.limits).all():
            moves.append((worth_change, partial(evaluator.flip, block)))
    if moves:
        max(moves, key=lambda move: move[0])[1]()
    return bool(moves)
