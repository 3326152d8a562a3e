"""The dependency graph: from one recorded forward pass to axes and layouts.

from prune2deploy.graph import trace
graph = trace(model, torch.randn(1, 3, 224, 224))
for axis in graph.axes: ...
"""

from prune2deploy.graph.axes import Axis, Block, Graph, Layer, Member, Polynomial
from prune2deploy.graph.keep import keep, require_prunable
from prune2deploy.graph.rules import rule
from prune2deploy.graph.trace import trace

__all__ = [
    "Axis",
    "Block",
    "Graph",
    "Layer",
    "Member",
    "Polynomial",
    "keep",
    "require_prunable",
    "rule",
    "trace",
]
