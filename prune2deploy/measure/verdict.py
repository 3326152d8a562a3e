"""Verdicts: what an interval says about a budget."""

from __future__ import annotations

from typing import Literal

Verdict = Literal["met", "missed", "uncertain"]


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
