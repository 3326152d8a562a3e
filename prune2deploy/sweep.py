"""Latency against pruning ratio: every axis loses the same fraction, each model is measured.

In: a :class:`SweepJob`. Out: a report with one point per ratio, measured interleaved with the
unpruned model. Widths stay on the grid of the target's channel multiple, so neighbouring ratios
may give the same model; it is then built and measured once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from prune2deploy import candidate, loop, measure, summary
from prune2deploy.candidate import Built, Workshop
from prune2deploy.config import SweepOptions
from prune2deploy.graph import Graph
from prune2deploy.importance import score
from prune2deploy.job import Job
from prune2deploy.measure import Comparison
from prune2deploy.plan.allocate import channels
from prune2deploy.plan.choices import Floats, choices, importance_curves
from prune2deploy.plan.plan import Plan
from prune2deploy.report import write
from prune2deploy.report.content import SweepPoint, SweepReport


def uniform_counts(
    graph: Graph, curves: Mapping[str, Floats], ratio: float, multiple: int
) -> dict[str, int]:
    """Kept channels when every axis loses the fraction ``ratio``, on the grid of ``multiple``.

    Each width is the option nearest to what the ratio leaves, the wider of two as near.
    """
    counts: dict[str, int] = {}
    for choice in choices(graph, curves, multiple=multiple, limit=100_000):
        wanted = (1 - ratio) * choice.size
        width = int(min(choice.options, key=lambda n: (abs(n - wanted), -n)))
        counts.update(dict.fromkeys(choice.axes, width))
    return counts
