"""The axes of a model as a table and as plain values.

In: a graph. Out: text for people and a document for programs.
"""

from __future__ import annotations

from typing import Any

from prune2deploy.graph.axes import Axis, Graph
from prune2deploy.report.text import table
from prune2deploy.units import readable

TEXT = (0, 5, 6)  # columns aligned to the left
LAYERED = frozenset({"weight", "bias", "running_mean", "running_var"})
PLACES = 3  # members named in the table; the document names all


def text(name: str, graph: Graph) -> str:
    """One line per axis: where it lives, how wide it is, what it controls, why it is frozen."""
    rows = [
        [
            axis.name,
            str(axis.size),
            readable(controlled(graph, axis)[0]),
            readable(controlled(graph, axis)[1]),
            "" if axis.tie is None else str(axis.tie),
            axis.frozen or "prunable",
            _places(axis),
        ]
        for axis in graph.axes
    ]
    prunable = {axis.name for axis in graph.prunable}
    lines = [
        f"{name}: {len(graph.axes)} axes, {len(prunable)} of them prunable; "
        f"{readable(graph.params())} parameters, {readable(graph.macs())} MACs, "
        f"{len(graph.operators)} operators",
        "",
        table(["axis", "width", "params", "MACs", "tie", "state", "lives in"], rows, TEXT),
    ]
    if graph.ties:
        lines += ["", "axes with the same number under tie keep equally many channels"]
    if graph.blocks:
        lines += ["", "removable blocks: " + ", ".join(block.name for block in graph.blocks)]
    if graph.unknown:
        found = ", ".join(f"{op} ({count})" for op, count in graph.unknown.items())
        lines += ["", f"operators without a rule, whose axes are frozen: {found}"]
    return "\n".join(lines)


def document(name: str, graph: Graph) -> dict[str, Any]:
    """The same as plain values, with every member."""
    return {
        "schema": 1,
        "model": name,
        "params": graph.params(),
        "macs": graph.macs(),
        "operators": len(graph.operators),
        "axes": [_axis(graph, axis) for axis in graph.axes],
        "blocks": [block.name for block in graph.blocks],
        "unknown": dict(graph.unknown),
    }


def controlled(graph: Graph, axis: Axis) -> tuple[int, int]:
    """Parameters and multiply-accumulates that depend on the axis (an upper bound if shared)."""
    none = graph.sizes({axis.name: 0})
    full = graph.sizes({})
    macs = sum(
        layer.macs(full) - layer.macs(none)
        for layer in graph.layers
        if axis.name in layer.macs.axes
    )
    return graph.params() - graph.params({axis.name: 0}), macs


def _axis(graph: Graph, axis: Axis) -> dict[str, Any]:
    params, macs = controlled(graph, axis)
    return {
        "name": axis.name,
        "size": axis.size,
        "frozen": axis.frozen,
        "tie": axis.tie,
        "params": params,
        "macs": macs,
        "members": [{"tensor": m.tensor, "dim": m.dim, "role": m.role} for m in axis.members],
    }


def _places(axis: Axis) -> str:
    places = list(dict.fromkeys(_place(member.tensor) for member in axis.members))
    more = f" and {len(places) - PLACES} more" if len(places) > PLACES else ""
    return ", ".join(places[:PLACES]) + more


def _place(tensor: str) -> str:
    """The layer of a stored tensor; a bare parameter by its own name."""
    path, _, name = tensor.rpartition(".")
    return path if path and name in LAYERED else tensor
