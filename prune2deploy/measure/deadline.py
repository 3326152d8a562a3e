"""Deadlines, and what an interval says about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["met", "missed", "uncertain"]


@dataclass(frozen=True)
class Goal:
    """A deadline in wall time; sampling goes on until it can be judged, or time is up.

    Attributes:
        limit_ms: Greatest latency that meets it, milliseconds.
        percentile: Of the latency: 50, 95 or 99.
    """

    limit_ms: float
    percentile: int = 50


def verdict(interval: tuple[float, float], budget: float) -> Verdict:
    """Compare a 95 % interval with a budget in the same unit.

    Args:
        interval: Lower and upper bound.
        budget: Greatest value allowed.

    Returns:
        ``"met"`` when the whole interval is within the budget, ``"missed"`` when the whole of it
        is beyond, else ``"uncertain"``.
    """
    low, high = interval
    if high <= budget:
        return "met"
    return "missed" if low > budget else "uncertain"
