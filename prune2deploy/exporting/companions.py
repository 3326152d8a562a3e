"""The files beside an ONNX file that hold weights of it.

In: the path of an ONNX file. Out: their names, or a hash of all contents. ``onnx`` is imported
inside the functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prune2deploy import atomic


def companions(path: Path) -> tuple[str, ...]:
    """Names of the files beside ``path`` that hold weights of it, sorted.

    Weights of branches, loops and functions count too.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    tensors = [*_in_graph(model.graph), *(t for f in model.functions for t in _in_nodes(f.node))]
    entries = (entry for tensor in tensors for entry in tensor.external_data)
    return tuple(sorted({entry.value for entry in entries if entry.key == "location"}))


def companion_files(path: Path) -> tuple[Path, ...]:
    """Paths of those files."""
    return tuple(path.parent / name for name in companions(path))


def digest(path: Path) -> str:
    """SHA-256 of an ONNX file and its companions, in hexadecimal digits."""
    return atomic.sha256(path, *companion_files(path))


def _in_graph(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph, however deep."""
    yield from graph.initializer
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Any) -> Iterator[Any]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _in_graph(graph)
