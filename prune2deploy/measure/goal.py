"""What a comparison is to decide beyond the ratio: whether a candidate meets a deadline."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Goal:
    """A deadline in wall time; sampling goes on until it can be judged, or time is up.

    Attributes:
        limit_ms: Greatest latency that meets it, milliseconds.
        percentile: Of the latency: 50, 95 or 99.
    """

    limit_ms: float
    percentile: int = 50
