"""Rules for operators that move, merge, split, pick or resize dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from prune2deploy.graph.layout import (
    Layout,
    Node,
    cat,
    cut,
    freeze,
    leaf,
    prod,
    regroup,
    unify,
)
from prune2deploy.graph.rules import Call, broadcast, fresh, rule, turn


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias",
      "aten::view_copy", "aten::_reshape_copy")  # fmt: skip
def view(call: Call) -> Layout:
    """Read the same elements, row-major, as other dimensions, or as another type."""
    x, shape = call.dims("self"), call.shape()
    if call["dtype"] is not None:
        return _read_as(x, shape)
    if 0 in shape:
        return fresh(shape, "empty tensor")
    kept = next((i for i, n in enumerate(shape) if i >= len(x) or x[i].size != n), len(shape))
    groups = regroup(x[kept:], shape[kept:])
    if groups is None:
        return (*x[:kept], *fresh(shape[kept:], "a view cuts across its channels"))
    return (*x[:kept], *groups)


def _read_as(x: Layout, shape: tuple[int, ...]) -> Layout:
    """Elements of another type; where these are larger or smaller, channels are not kept apart."""
    if tuple(node.size for node in x) == shape:
        return x
    reason = "its elements are read as another type"
    freeze(x[-1:], reason)
    return (*x[:-1], leaf(shape[-1], reason))


@rule("aten::t", "aten::transpose", "aten::permute", "aten::transpose_", "aten::t_")
def transposed(call: Call) -> Layout:
    """Reorder dimensions."""
    x = call.dims("self")
    return tuple(x[place] for place in turn(call, len(x)))


@rule("aten::unsqueeze", "aten::unsqueeze_")
def unsqueeze(call: Call) -> Layout:
    """Insert a dimension of size one."""
    x = list(call.dims("self"))
    place = call["dim"] if call["dim"] >= 0 else call["dim"] + len(x) + 1
    x.insert(place, leaf(1))
    return tuple(x)


@rule("aten::squeeze", "aten::squeeze_")
def squeeze(call: Call) -> Layout:
    """Drop dimensions of size one."""
    x, chosen = call.dims("self"), call["dim"]
    chosen = range(len(x)) if chosen is None else chosen
    places = {d % max(len(x), 1) for d in ([chosen] if isinstance(chosen, int) else chosen)}
    return tuple(n for i, n in enumerate(x) if not (i in places and n.size == 1))


@rule("aten::expand", "aten::expand_copy")
def expand(call: Call) -> Layout:
    """Repeat dimensions of size one; the repeated ones are new."""
    x, shape = call.dims("self"), call.shape()
    lead = len(shape) - len(x)
    return tuple(
        x[i - lead] if i >= lead and x[i - lead].size == n else leaf(n) for i, n in enumerate(shape)
    )


@rule("aten::repeat", "aten::tile")
def repeat(call: Call) -> Layout:
    """Tile: ``prod(copy, channel)``."""
    x, repeats = call.dims("self"), list(call["repeats"])
    x = (*(leaf(1) for _ in range(len(repeats) - len(x))), *x)
    copies = call.symbols["repeats"] = fresh(repeats)
    return tuple(prod([copy, node]) for copy, node in zip(copies, x, strict=True))


@rule("aten::repeat_interleave")
def repeat_interleave(call: Call) -> Layout:
    """Repeat each element: ``prod(channel, copy)``; data-dependent repeats freeze."""
    x, times, dim = call.dims("self"), call["repeats"], call["dim"]
    if not isinstance(times, int) or dim is None:
        freeze(x, "repeated a varying number of times")
        return fresh(call.shape(), "repeated a varying number of times")
    dims = list(x)
    (copies,) = call.symbols["repeats"] = fresh([times])
    dims[dim] = prod([dims[dim], copies])
    return tuple(dims)


@rule("aten::cat", "aten::concat")
def concatenate(call: Call) -> Layout:
    """Segments along one dimension; all others are shared."""
    layouts = [call.notebook.value(t).dims for t in call["tensors"] if t.numel() or t.dim() > 1]
    rank = len(call.shape())
    dim = call["dim"] % rank
    result = list(broadcast([without(dims, dim) for dims in layouts])) if rank > 1 else []
    result.insert(dim, cat([dims[dim] for dims in layouts]))
    return tuple(result)


def without(dims: Layout, dim: int) -> Layout:
    """A layout with one dimension less."""
    return (*dims[:dim], *dims[dim + 1 :])


@rule("aten::stack")
def stack(call: Call) -> Layout:
    """A new dimension that numbers the tensors: frozen, since each has its own meaning."""
    layouts = [call.notebook.value(t).dims for t in call["tensors"]]
    result = list(broadcast(layouts)) if layouts[0] else []
    dim = call["dim"] % (len(layouts[0]) + 1)
    result.insert(dim, leaf(len(layouts), "stacked tensors"))
    return tuple(result)


@rule("aten::split", "aten::chunk", "aten::unsafe_split", "aten::unsafe_chunk")
def split(call: Call) -> list[Layout]:
    """Parts of one size, which stay equally wide; the last may be smaller."""
    parts = _segments(call, [t.shape[call["dim"] % t.dim()] for t in call.outputs])
    dim = call["dim"] % len(parts[0])
    first = parts[0][dim]
    same = (part[dim] for part in parts[1:] if part[dim].size == first.size)
    call.notebook.recording.ties.extend((first, other) for other in same)
    return parts


@rule("aten::split_with_sizes", "aten::split_with_sizes_copy", "aten::unsafe_split_with_sizes")
def split_with_sizes(call: Call) -> list[Layout]:
    """Parts of given sizes."""
    return _segments(call, list(call["split_sizes"]))


def _segments(call: Call, sizes: Sequence[int]) -> list[Layout]:
    x = call.dims("self")
    dim = call["dim"] % len(x)
    reason = "split across its channels"
    pieces = cut(x[dim], list(itertools.accumulate(sizes))[:-1], reason)
    if pieces is None or len(pieces) != len(sizes):
        freeze([x[dim]], reason)
        pieces = [leaf(n, reason) for n in sizes]
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


@rule("aten::glu")
def gated(call: Call) -> Layout:
    """The first half times the sigmoid of the second: both hold the same channels."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    reason = "halves cut across its channels"
    pieces = cut(x[dim], [x[dim].size // 2], reason)
    if pieces is None:
        return (*x[:dim], leaf(call.shape()[dim], reason), *x[dim + 1 :])
    unify(*pieces)
    return (*x[:dim], pieces[0], *x[dim + 1 :])


@rule("aten::slice", "aten::slice_copy")
def sliced(call: Call) -> Layout:
    """A range of positions; a step above one freezes."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    size, length = x[dim].size, call.shape()[dim]
    if length == size:
        return x
    start = call["start"] or 0
    start = max(0, min(size, start + size if start < 0 else start))
    if call["step"] not in (None, 1) or not length:
        call.symbols["start"] = fresh([start]) if start else ()
        return (*x[:dim], _stepped(x[dim], start, length, call["step"]), *x[dim + 1 :])
    pieces = cut(x[dim], [start, start + length])
    if pieces is None:
        call.symbols["start"], call.symbols["end"] = fresh([start]), fresh([start + length])
        return (*x[:dim], leaf(length, "a slice cuts across its channels"), *x[dim + 1 :])
    if call.value("self").origin:
        freeze(pieces, "a slice of a stored table")
    at = 0
    for piece in pieces:
        if at == start:
            before = cut(x[dim], [start]) if start else None
            call.symbols["start"] = (before[0],) if before else ()
            call.symbols["end"] = (*call.symbols["start"], piece)
            return (*x[:dim], piece, *x[dim + 1 :])
        at += piece.size
    raise AssertionError((size, start, length, pieces))


def _stepped(node: Node, start: int, length: int, step: int) -> Node:
    """Every ``step``-th position: the phase of ``prod(position, phase)`` where that divides."""
    if length and node.size == length * step and start < step:
        groups = regroup([node], (length, step), "positions are picked by number")
        if groups is not None:
            freeze([groups[1]], "positions are picked by number")
            return groups[0]
    freeze([node], "positions are picked by number")
    return leaf(length, "positions are picked by number")


@rule("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty",
      "aten::new_empty_strided")  # fmt: skip
def filled(call: Call) -> Layout:
    """A new tensor of one value: its dimensions are whatever they are used with."""
    return fresh(call.shape())
