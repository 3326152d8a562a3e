"""Sizes of layout terms under a plan: the arithmetic that pruning and capturing share."""

from __future__ import annotations

import math
from collections.abc import Sequence

from prune2deploy.graph.axes import Graph
from prune2deploy.graph.layout import CAT, LEAF, Layout, Node, find
from prune2deploy.plan.plan import Plan


class Widths:
    """Evaluates layout terms of a graph's recording with the channels that a plan keeps."""

    def __init__(self, graph: Graph, plan: Plan) -> None:
        sizes = graph.sizes(plan.counts)
        self._sizes = {key: sizes[name] for key, name in graph.recording.axis_names.items()}
        self._known: dict[int, int] = {}

    def __call__(self, node: Node) -> int:
        """Width of one term."""
        node = find(node)
        known = self._known.get(id(node))
        if known is None:
            known = self._known[id(node)] = self._width(node)
        return known

    def _width(self, node: Node) -> int:
        if node.kind == LEAF:
            return self._sizes.get(id(node), node.size)
        parts = [self(part) for part in node.parts]
        return sum(parts) if node.kind == CAT else math.prod(parts)

    def shape(self, dims: Layout) -> tuple[int, ...]:
        """Shape of a layout."""
        return tuple(self(node) for node in dims)

    def of(self, terms: Sequence[Node]) -> int | None:
        """Sum of the widths of some terms, or None where there is none."""
        return sum(self(node) for node in terms) if terms else None
