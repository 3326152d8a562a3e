"""How many channels each group loses: pure arithmetic on scores.

A record's scores are per *choice*: one channel, or one channel of each of several groups that lose
equally many. Ties in score are broken by position, so that exactly as many go as were asked for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

EPSILON = 1e-6  # 10 * (1 - 0.9) is to be 1, not 0.99…


@dataclass(frozen=True, eq=False)
class Record:
    """One group in a ranking.

    Attributes:
        scores: Score per choice, any order.
        initial: Choices before the first step.
        ratio: Fraction of ``initial`` to have removed after this step.
        step: Number of choices kept must be a multiple of this.
        ceiling: No larger fraction of ``initial`` may be removed.
    """

    scores: npt.NDArray[np.float64]
    initial: int
    ratio: float
    step: int = 1
    ceiling: float = 1.0

    @property
    def least(self) -> int:
        """Choices that are kept in any case."""
        return max(1, math.ceil(self.initial * (1 - self.ceiling) - EPSILON))


def floor_keep(initial: int, ratio: float) -> int:
    """Choices kept of ``initial`` when ``ratio`` of them goes, rounded down."""
    return int(initial * (1 - ratio) + EPSILON)


def rounded(keep: int, record: Record) -> int:
    """``keep`` within the record's bounds and on its grid: the nearest multiple, never none.

    A group narrower than one step keeps everything.
    """
    current = len(record.scores)
    keep = min(max(keep, record.least), current)
    if record.step > 1 and keep < current:
        keep = max((2 * keep + record.step) // (2 * record.step), 1) * record.step
        while keep < record.least:
            keep += record.step
    return min(keep, current)


def alone(record: Record) -> int:
    """Choices kept by a group that is ranked by itself."""
    return rounded(floor_keep(record.initial, record.ratio), record)


def together(records: Sequence[Record]) -> list[int]:
    """Choices kept by each of several groups that share one ratio and one ranking."""
    total = sum(record.initial for record in records)
    current = [len(record.scores) for record in records]
    remove = sum(current) - floor_keep(total, records[0].ratio)
    pool = [
        (score, number, rank)
        for number, record in enumerate(records)
        for rank, score in enumerate(np.sort(record.scores).tolist())
        if rank < len(record.scores) - record.least
    ]
    chosen = sorted(pool)[: max(remove, 0)]
    lost = [0] * len(records)
    for _, number, _ in chosen:
        lost[number] += 1
    return [
        rounded(size - gone, record)
        for record, size, gone in zip(records, current, lost, strict=True)
    ]


def lowest(scores: npt.NDArray[np.float64], count: int) -> npt.NDArray[np.int64]:
    """Positions of the ``count`` lowest scores, ascending; ties go by position."""
    return np.sort(np.argsort(scores, kind="stable")[:count])
