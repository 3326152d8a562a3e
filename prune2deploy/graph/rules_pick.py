"""Rules for operators that pick, rank or reduce positions: those dimensions stay or vanish."""

from __future__ import annotations

from typing import Any

import torch

from prune2deploy.graph.layout import VARYING, Layout, find, freeze, leaf, unify
from prune2deploy.graph.rules import Call, broadcast, fresh, rule
from prune2deploy.graph.rules_shape import without


@rule("aten::select", "aten::select_copy")
def select(call: Call) -> Layout:
    """One position of a dimension, which therefore stays."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    freeze([x[dim]], "positions are picked by number")
    return without(x, dim)


@rule("aten::unbind", "aten::unbind_copy")
def unbind(call: Call) -> list[Layout]:
    """All positions of a dimension apart; it stays."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    freeze([x[dim]], "positions are picked by number")
    return [without(x, dim)] * len(call.outputs)


@rule("aten::select_scatter", "aten::slice_scatter", "aten::diagonal_scatter")
def scatter_view(call: Call) -> Layout:
    """Write a part into a copy: the written part shares the other dimensions."""
    x = call.dims("self")
    freeze(call.dims("src"), "written into part of a tensor")
    freeze(x, "written into part of a tensor")
    return x


@rule("aten::index_select")
def index_select(call: Call) -> Layout:
    """Positions picked by number along one dimension, which stays."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    freeze([x[dim], *call.dims("index")], "positions are picked by number")
    picked = leaf(call.shape()[dim], "positions are picked by number")
    return (*x[:dim], picked, *x[dim + 1 :])


@rule("aten::gather", "aten::scatter", "aten::scatter_", "aten::scatter_add", "aten::scatter_add_",
      "aten::take_along_dim", "aten::scatter_reduce", "aten::scatter_reduce_")  # fmt: skip
def gather(call: Call) -> Layout:
    """Positions picked along one dimension stay; the others are shared where sizes agree."""
    x = call.dims("self")
    dim = call["dim"] % max(len(x), 1)
    reason = "positions are picked by number"
    freeze(x[dim : dim + 1], reason)
    for tensor in call.tensors()[1:]:
        for place, node in enumerate(call.notebook.value(tensor).dims):
            if place != dim and node.size == x[place].size:
                unify(node, x[place])
            else:
                freeze([node, x[place]], reason)
    dims = call.dims("index") if "scatter" not in call.name else x
    return tuple(dims)


@rule("aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_",
      "aten::_unsafe_index_put", "aten::_index_put_impl_")  # fmt: skip
def index(call: Call) -> Layout:
    """Advanced indexing: indexed dimensions stay, the others pass where they can be told."""
    x, chosen = call.dims("self"), list(call["indices"])
    reason = "positions are picked by number"
    indexed = _indexed(chosen, len(x))
    freeze([x[place] for place in indexed], reason)
    numbers = [call.notebook.value(e).dims for e in chosen if e is not None]
    for dims in numbers:
        freeze(dims, reason)
    if call["values"] is not None:
        _couple_values(call, x, indexed)
        return x
    kept = [node for place, node in enumerate(x) if place not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = indexed[0] if adjacent else 0
    shape = call.shape()
    picked = fresh(shape[front : front + len(shape) - len(kept)], reason)
    masks = any(e is not None and e.dtype in (torch.bool, torch.uint8) for e in chosen)
    if any(numbers) and not masks:
        picked = broadcast(numbers)
    elif masks:
        picked = tuple(leaf(node.size, VARYING) for node in picked)
    return (*kept[:front], *picked, *kept[front:])


@rule("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_dim",
      "aten::unique_consecutive", "torchvision::nms")  # fmt: skip
def found(call: Call) -> list[Layout]:
    """As many positions as the values say; what they were looked for in stays."""
    for tensor in call.tensors():
        freeze(call.notebook.value(tensor).dims, "positions are found by value")
    return [
        tuple(leaf(n, "numbers" if i else VARYING) for i, n in enumerate(t.shape))
        for t in call.outputs
    ]


@rule("aten::masked_scatter", "aten::masked_scatter_")
def fill_masked(call: Call) -> Layout:
    """Masked positions take the elements of a source in order, whatever its shape.

    Rows of the source fill rows as a whole where the mask does not vary along the last dimension.
    """
    mask, source = call["mask"], call.dims("source")
    x = broadcast([call.dims("self"), call.dims("mask")])
    reason = "filled in order"
    uniform = mask.dim() > 0 and (mask.shape[-1] == 1 or mask.stride(-1) == 0)
    if x and source and uniform and x[-1].size == source[-1].size:
        unify(x[-1], source[-1])
        freeze([*x[:-1], *source[:-1]], reason)
    else:
        freeze([*x, *source], reason)
    return x


@rule("aten::index_fill", "aten::index_fill_")
def index_fill(call: Call) -> Layout:
    """Positions of one dimension are overwritten by number; it stays."""
    x = call.dims("self")
    dim = call["dim"] % max(len(x), 1)
    freeze([*x[dim : dim + 1], *call.dims("index")], "positions are picked by number")
    return x


@rule("aten::tril", "aten::triu", "aten::tril_", "aten::triu_")
def triangle(call: Call) -> Layout:
    """What lies on one side of a diagonal: both dimensions stay.

    The main diagonal stays where it is if both lose the same positions.
    """
    x = call.dims("self")
    if find(x[-2]) is not find(x[-1]) or call["diagonal"]:
        freeze(x[-2:], "cut along a diagonal")
    return x


@rule("aten::index_add", "aten::index_add_", "aten::index_copy", "aten::index_copy_")
def index_write(call: Call) -> Layout:
    """Rows are written by number: that dimension stays, the others are shared."""
    x, source = call.dims("self"), call.dims("source")
    dim = call["dim"] % max(len(x), 1)
    freeze([x[dim], source[dim], *call.dims("index")], "positions are picked by number")
    broadcast([without(x, dim), without(source, dim)])
    return x


def _couple_values(call: Call, x: Layout, indexed: list[int]) -> None:
    values = call.dims("values")
    tail = len(x) - 1 - max(indexed)
    for node, own in zip(x[len(x) - tail :], values[len(values) - tail :], strict=False):
        if node.size == own.size:
            unify(node, own)
    freeze(values[: max(len(values) - tail, 0)], "positions are picked by number")


def _indexed(chosen: list[Any], rank: int) -> list[int]:
    """The dimensions that index tensors address; a mask of rank r addresses r of them."""
    places: list[int] = []
    at = 0
    for entry in chosen:
        width = 1
        if entry is not None:
            if entry.dtype in (torch.bool, torch.uint8):
                width = max(entry.dim(), 1)
            places += range(at, min(at + width, rank))
        at += width
    return places


@rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::var",
    "aten::std", "aten::var_mean", "aten::std_mean", "aten::logsumexp", "aten::prod", "aten::any",
    "aten::all", "aten::norm", "aten::linalg_vector_norm", "aten::argmax", "aten::argmin",
    "aten::aminmax", "aten::nansum", "aten::nanmean", "aten::median", "aten::nanmedian",
    "aten::count_nonzero", "aten::square_sum",
)  # fmt: skip
def reduce(call: Call) -> list[Layout]:
    """Reduced dimensions vanish or become one wide; a position found there is a number."""
    x = call.notebook.value(call.tensors()[0]).dims
    dim = call["dim"]
    if dim is None or dim == []:
        places = set(range(len(x)))
    else:
        places = {d % max(len(x), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    for tensor in call.outputs[_first_number(call) :]:
        reduced = tuple(x[place] for place in places)
        call.notebook.freeze_if_read(tensor, reduced, "positions are found by number")
    keep = bool(call["keepdim"])
    dims = tuple(leaf(1) if i in places else n for i, n in enumerate(x) if keep or i not in places)
    return [dims] * len(call.outputs)


def _first_number(call: Call) -> int:
    """Which outputs say where a value was found: all from this one on."""
    if call.name in ("aten::argmax", "aten::argmin"):
        return 0
    return 1 if call.name in FINDING else len(call.outputs)


FINDING = frozenset({"aten::max", "aten::min", "aten::median", "aten::nanmedian"})
"""Reductions that return values, then where these were found."""


@rule("aten::topk", "aten::sort", "aten::argsort", "aten::kthvalue", "aten::mode",
      "aten::cummax", "aten::cummin")  # fmt: skip
def order(call: Call) -> list[Layout]:
    """Positions are ranked along one dimension, which stays."""
    x = call.dims("self")
    dim = (-1 if call["dim"] is None else call["dim"]) % max(len(x), 1)
    freeze(x[dim : dim + 1], "positions are ranked")
    return [
        tuple(
            n if n.size == size and i != dim else leaf(size, "positions are ranked")
            for i, (n, size) in enumerate(zip(x, t.shape, strict=True))
        ) if t.dim() == len(x) else fresh(t.shape, "positions are ranked")
        for t in call.outputs
    ]  # fmt: skip
