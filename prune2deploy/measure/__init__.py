"""Honest latency: raw nanoseconds of interleaved runs become an interval and a verdict."""

from prune2deploy.measure.compare import Measurement, compare, profile, single
from prune2deploy.measure.deadline import Goal, Verdict, verdict
from prune2deploy.measure.host import fingerprint, native_channel_multiple
from prune2deploy.measure.summary import DISTURBED, Comparison, LatencyStats

__all__ = [
    "DISTURBED",
    "Comparison",
    "Goal",
    "LatencyStats",
    "Measurement",
    "Verdict",
    "compare",
    "fingerprint",
    "native_channel_multiple",
    "profile",
    "single",
    "verdict",
]
