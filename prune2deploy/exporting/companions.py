"""The files beside an ONNX file that hold weights of it.

In: the path of an ONNX file. Out: their names, their size, a hash of all contents, or a copy.
``onnx`` is imported inside the functions.
"""

from __future__ import annotations

import shutil
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
    return tuple(sorted({entry.value for entry in _locations(model)}))


def companion_files(path: Path) -> tuple[Path, ...]:
    """Paths of those files."""
    return tuple(path.parent / name for name in companions(path))


def size(path: Path) -> int:
    """Bytes of an ONNX file and its companions."""
    return sum(one.stat().st_size for one in (path, *companion_files(path)))


def copy(path: Path, out: Path) -> None:
    """Copy an ONNX file to ``out``, and its companions to names of its own: ``NAME.data``.

    So several copies may lie in one folder, each with its weights.
    """
    import onnx

    names = {name: f"{out.name}.data{i or ''}" for i, name in enumerate(companions(path))}
    if not names:
        shutil.copyfile(path, out)
        return
    for name, own in names.items():
        shutil.copyfile(path.parent / name, out.with_name(own))
    model = onnx.load(str(path), load_external_data=False)
    for entry in _locations(model):
        entry.value = names[entry.value]
    onnx.save_model(model, str(out))


def digest(path: Path) -> str:
    """SHA-256 of an ONNX file and its companions, in hexadecimal digits."""
    return atomic.sha256(path, *companion_files(path))


def _locations(model: Any) -> Iterator[Any]:
    """The entries of all stored tensors, however deep, that name the file of their values."""
    functions = (tensor for function in model.functions for tensor in _in_nodes(function.node))
    for tensor in (*_in_graph(model.graph), *functions):
        yield from (entry for entry in tensor.external_data if entry.key == "location")


def _in_graph(graph: Any) -> Iterator[Any]:
    """Every stored tensor of a graph, however deep."""
    yield from graph.initializer
    yield from _in_nodes(graph.node)


def _in_nodes(nodes: Any) -> Iterator[Any]:
    for attribute in (attribute for node in nodes for attribute in node.attribute):
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _in_graph(graph)
