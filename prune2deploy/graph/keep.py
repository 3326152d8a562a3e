"""Freeze what a user wants to stay as it is, by the names of layers.

In: a graph, and names or shell patterns of modules, stored tensors or axes. Out: the graph in which
every channel that those make is frozen, and no block can go that holds any of the tensors or makes
all of a named axis.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase

from prune2deploy.errors import ConfigError, TraceError
from prune2deploy.graph.axes import Axis, Graph, packed

KEPT = "kept as asked"
_SHOWN = 3  # names offered for one that is unknown


def keep(graph: Graph, patterns: Sequence[str]) -> Graph:
    """The graph with the outputs of the named layers frozen.

    Args:
        graph: The traced model.
        patterns: Paths of modules (with all that they hold), names of stored tensors or of axes;
            ``*``, ``?`` and ``[...]`` as in a shell (``layer1``, ``*.qkv``).

    Raises:
        ConfigError: A pattern fits nothing.
    """
    if not patterns:
        return graph
    _check(graph, patterns)
    tensors = {name for name in graph.tensors if _fits(_paths(name), patterns)}
    named = [axis for axis in graph.axes if _fits([axis.name], patterns)]
    made = {axis.name for axis in graph.axes if _makes(axis, tensors)} | {a.name for a in named}
    makers = [{m.tensor for m in axis.members if m.role != "in"} for axis in named]
    blocks = tuple(
        block
        for block in graph.blocks
        if tensors.isdisjoint(block.weights)
        and not any(those and those <= set(block.weights) for those in makers)
    )
    return replace(freeze(graph, made, KEPT), blocks=blocks, _by_name={})


def freeze(graph: Graph, names: Collection[str], reason: str) -> Graph:
    """The graph in which the named axes, and those tied to them, keep all their channels."""
    tied = {axis.tie for axis in graph.axes if axis.name in names} - {None}
    axes = tuple(
        replace(axis, frozen=axis.frozen or reason)
        if axis.name in names or axis.tie in tied
        else axis
        for axis in graph.axes
    )
    return replace(graph, axes=axes, _by_name={})


def require_prunable(graph: Graph) -> None:
    """Raise TraceError, with the reasons, where no axis may lose channels."""
    if not graph.prunable:
        reasons = sorted({str(axis.frozen) for axis in graph.axes if axis.frozen})
        raise TraceError(
            "the model has nothing to prune: every axis is frozen "
            f"({', '.join(reasons)}); `prune2deploy inspect` lists them" + packed(graph.unknown)
        )


def _makes(axis: Axis, tensors: set[str]) -> bool:
    """Whether the channels are made, or worked on one by one, by any of the tensors."""
    return any(member.role != "in" and member.tensor in tensors for member in axis.members)


def _paths(tensor: str) -> Iterator[str]:
    """The name of a stored tensor and of every module that holds it, outermost first."""
    return itertools.accumulate(tensor.split("."), "{}.{}".format)


def _fits(names: Iterable[str], patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for name in names for pattern in patterns)


def _check(graph: Graph, patterns: Sequence[str]) -> None:
    paths = [path for tensor in graph.tensors for path in _paths(tensor)]
    known = list(dict.fromkeys([*paths, *(axis.name for axis in graph.axes)]))
    for pattern in patterns:
        if not _fits(known, [pattern]):
            if _fits((call.name for call in graph.recording.calls), [pattern]):
                raise ConfigError(
                    f"--keep: found {pattern!r}, which names layers without weights: they make no "
                    "channels, so there is nothing to keep; name the layers with weights before "
                    "them"
                )
            near = difflib.get_close_matches(pattern, known, n=_SHOWN)
            hint = f"did you mean {' or '.join(near)}? " if near else ""
            raise ConfigError(
                f"--keep: found {pattern!r}, which names no layer, tensor or axis of the model; "
                f"{hint}`prune2deploy inspect` lists them"
            )
