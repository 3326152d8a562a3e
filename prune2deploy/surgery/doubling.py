"""The same forward pass with a batch of two: the batch can then be told from other sizes of one.

In: a module and its graph. Out: a graph of the same axes, recorded with twice the example, or the
one that was given where that records something else.
"""

from __future__ import annotations

from torch import nn

from prune2deploy.errors import TraceError
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.build import build
from prune2deploy.graph.calling import twice
from prune2deploy.graph.record import record
from prune2deploy.graph.recording import Recording


def with_batch(source: nn.Module, graph: Graph) -> Graph:
    """Trace again with a doubled batch, unless that changes what is recorded."""
    recording: Recording = graph.recording
    doubled = twice(recording.example)
    if doubled is recording.example:
        return graph
    try:
        wider = build(record(source, doubled, recording.forward_fn))
    except TraceError:
        return graph
    same = [(a.name, a.size) for a in wider.axes] == [(a.name, a.size) for a in graph.axes]
    return wider if same else graph
