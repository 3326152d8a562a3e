"""What stored tensors are multiplied by before they are sliced, for what stays to mean the same.

In: a graph and a plan. Out: factors of the lengths of weights (``lengths``) and of what makes the
queries or keys of attention (``scales``).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from prune2deploy.graph.axes import Graph
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.lengths import Kept, rescaled
from prune2deploy.surgery.scales import factors
from prune2deploy.surgery.widths import Widths

Factors = Mapping[str, torch.Tensor]
WHOLE = Plan({})


def compensation(
    graph: Graph,
    stored: Mapping[str, torch.Tensor],
    kept: Kept,
    plan: Plan,
    before: Plan = WHOLE,
) -> Factors:
    """One factor per stored tensor that needs one; it broadcasts to the traced shape.

    Args:
        graph: As traced.
        stored: Every stored tensor in its traced shape, zero where ``before`` keeps nothing.
        kept: Per stored tensor and dimension, the positions that stay (``None``: all).
        plan: What stays.
        before: What the tensors hold so far.
    """
    recording = graph.recording
    widths = Widths(graph, before), Widths(graph, plan)
    found = factors(recording, *widths, plan.removed)
    for name, factor in rescaled(stored, recording, kept).items():
        found[name] = found[name].to(factor) * factor if name in found else factor
    return found
