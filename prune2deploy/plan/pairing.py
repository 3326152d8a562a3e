"""Pair up the operators of several builds of one architecture.

In: profiles in execution order. Out: every operator with its timings in the builds that have it.

Runtimes name an operator after the model's, or number those that fusion makes; numbers move when
one fusion more or less takes place, and a module that was captured has other names than the
model's own code. Where names agree they decide. Else the sequences are aligned as texts are
compared (Needleman and Wunsch, J. Mol. Biol. 48 (1970)): the order is kept, an operator pairs up
with one of its kind, and equal names and ranks decide between several ways to do so.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prune2deploy.timing import OperatorTiming

Profile = Sequence[OperatorTiming]
_AGREE = 0.9  # share of names in common above which names decide
_RANKS, _NAME = 0.5, 0.25  # what equal ranks and names add to a pair of equal kind, which counts 1


@dataclass(frozen=True)
class Seen:
    """One operator across builds.

    Attributes:
        name: The runtime's name.
        kind: The runtime's operator type.
        timings: Build number to timing, for the builds that contain it.
    """

    name: str
    kind: str
    timings: Mapping[int, OperatorTiming]


def align(profiles: Sequence[Profile]) -> tuple[Seen, ...]:
    """Pair up the operators of several builds.

    The order is that of the first profile with the commonest sequence of kinds; operators that
    it lacks come behind.
    """
    kinds = [tuple(timing.kind for timing in profile) for profile in profiles]
    often = Counter(kinds)
    chosen = kinds.index(max(kinds, key=lambda one: often[one]))
    model = profiles[chosen]
    found: list[dict[int, OperatorTiming]] = [{chosen: timing} for timing in model]
    extra: dict[tuple[str, str, int], dict[int, OperatorTiming]] = {}
    for build, profile in enumerate(profiles):
        if build == chosen:
            continue
        pairs = _pairs(model, profile)
        for one, other in pairs:
            found[one][build] = profile[other]
        taken = {other for _, other in pairs}
        left = [timing for place, timing in enumerate(profile) if place not in taken]
        for key, timing in zip(_keys(left), left, strict=True):
            extra.setdefault(key, {})[build] = timing
    return tuple(_seen(timings) for timings in (*found, *extra.values()))


def _seen(timings: Mapping[int, OperatorTiming]) -> Seen:
    first = timings[min(timings)]
    return Seen(first.name, first.kind, dict(sorted(timings.items())))


def _keys(profile: Profile) -> list[tuple[str, str, int]]:
    """Name and kind of every operator, with its number among those of the same."""
    met: Counter[tuple[str, str]] = Counter()
    keys = []
    for timing in profile:
        pair = (timing.name, timing.kind)
        keys.append((*pair, met[pair]))
        met[pair] += 1
    return keys


def _pairs(model: Profile, profile: Profile) -> list[tuple[int, int]]:
    """Places of operators that correspond, ascending."""
    here, there = _keys(model), {key: place for place, key in enumerate(_keys(profile))}
    named = [(place, there[key]) for place, key in enumerate(here) if key in there]
    if len(named) >= _AGREE * max(len(model), len(profile)):
        return named
    return _aligned(_scores(model, profile))


def _scores(model: Profile, profile: Profile) -> npt.NDArray[np.float64]:
    """What pairing each operator with each is worth, float array (model, profile); 0 is no pair."""

    def equal(fact: Callable[[OperatorTiming], object]) -> npt.NDArray[np.bool_]:
        rows, columns = ([hash(fact(timing)) for timing in one] for one in (model, profile))
        return np.equal.outer(np.array(rows, dtype=np.int64), np.array(columns, dtype=np.int64))

    worth = 1 + _RANKS * equal(lambda timing: timing.ranks) + _NAME * equal(lambda t: t.name)
    return np.asarray(np.where(equal(lambda timing: timing.kind), worth, 0.0))


def _aligned(scores: npt.NDArray[np.float64]) -> list[tuple[int, int]]:
    """Pairs in ascending order of both, of the largest sum of scores; leaving out is free."""
    rows, columns = scores.shape
    best = np.zeros((rows + 1, columns + 1))
    for row in range(rows):
        paired = np.where(scores[row] > 0, best[row, :-1] + scores[row], 0.0)
        best[row + 1, 1:] = np.maximum.accumulate(np.maximum(best[row, 1:], paired))
    pairs = []
    row, column = rows, columns
    while row and column:
        score = scores[row - 1, column - 1]
        if score > 0 and best[row, column] == best[row - 1, column - 1] + score:
            pairs.append((row - 1, column - 1))
            row, column = row - 1, column - 1
        elif best[row, column] == best[row - 1, column]:
            row -= 1
        else:
            column -= 1
    return pairs[::-1]
