"""Rules for operators that move, merge, split, pick or resize dimensions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

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
from prune2deploy.graph.rules import KERNEL, Call, broadcast, fresh, rule, turn


@rule("aten::view", "aten::_unsafe_view", "aten::reshape", "aten::_reshape_alias",
      "aten::view_copy", "aten::_reshape_copy")  # fmt: skip
def view(call: Call) -> Layout:
    """Read the same elements, row-major, as other dimensions."""
    x, shape = call.dims("self"), call.shape()
    if 0 in shape:
        return fresh(shape, "empty tensor")
    kept = next((i for i, n in enumerate(shape) if i >= len(x) or x[i].size != n), len(shape))
    groups = regroup(x[kept:], shape[kept:])
    if groups is None:
        return (*x[:kept], *fresh(shape[kept:], "a view cuts across its channels"))
    return (*x[:kept], *groups)


@rule("aten::t", "aten::transpose", "aten::permute", "aten::transpose_", "aten::t_")
def transposed(call: Call) -> Layout:
    """Reorder dimensions."""
    x = call.dims("self")
    return tuple(x[place] for place in turn(call, len(x)))


@rule("aten::movedim", "aten::numpy_T", "aten::mT", "aten::swapaxes")
def moved(call: Call) -> Layout:
    """Reorderings that PyTorch decomposes; frozen should one ever come through."""
    freeze(call.dims("self"), f"operator {call.name} has no rule")
    return fresh(call.shape(), f"operator {call.name} has no rule")


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
    result = list(broadcast([_without(dims, dim) for dims in layouts])) if rank > 1 else []
    result.insert(dim, cat([dims[dim] for dims in layouts]))
    return tuple(result)


def _without(dims: Layout, dim: int) -> Layout:
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
    """Equal parts: cut, and keep the parts equally wide."""
    parts = _segments(call, [t.shape[call["dim"] % t.dim()] for t in call.outputs])
    dim = call["dim"] % len(parts[0])
    first = parts[0][dim]
    for other in parts[1:]:
        if other[dim].size == first.size:
            call.notebook.recording.ties.append((first, other[dim]))
        else:
            freeze([first, other[dim]], "split into parts of which the last is smaller")
    return parts


@rule("aten::split_with_sizes", "aten::split_with_sizes_copy", "aten::unsafe_split_with_sizes")
def split_with_sizes(call: Call) -> list[Layout]:
    """Parts of given sizes."""
    return _segments(call, list(call["split_sizes"]))


def _segments(call: Call, sizes: Sequence[int]) -> list[Layout]:
    x = call.dims("self")
    dim = call["dim"] % len(x)
    pieces = cut(x[dim], list(itertools.accumulate(sizes))[:-1])
    if pieces is None or len(pieces) != len(sizes):
        freeze([x[dim]], "split across its channels")
        pieces = [leaf(n, "split across its channels") for n in sizes]
    return [(*x[:dim], piece, *x[dim + 1 :]) for piece in pieces]


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
        return (*x[:dim], _stepped(x[dim], start, length, call["step"]), *x[dim + 1 :])
    pieces = cut(x[dim], [start, start + length])
    if pieces is None:
        return (*x[:dim], leaf(length, "a slice cuts across its channels"), *x[dim + 1 :])
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
        groups = regroup([node], (length, step))
        if groups is not None:
            freeze([groups[1]], "positions are picked by number")
            return groups[0]
    freeze([node], "positions are picked by number")
    return leaf(length, "positions are picked by number")


@rule("aten::select", "aten::select_copy")
def select(call: Call) -> Layout:
    """One position of a dimension, which therefore stays."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    freeze([x[dim]], "positions are picked by number")
    return _without(x, dim)


@rule("aten::unbind", "aten::unbind_copy")
def unbind(call: Call) -> list[Layout]:
    """All positions of a dimension apart; it stays."""
    x = call.dims("self")
    dim = call["dim"] % len(x)
    freeze([x[dim]], "positions are picked by number")
    return [_without(x, dim)] * len(call.outputs)


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
    for entry in chosen:
        if entry is not None:
            freeze(call.notebook.value(entry).dims, reason)
    if call["values"] is not None:
        _couple_values(call, x, indexed)
        return x
    kept = [node for place, node in enumerate(x) if place not in indexed]
    adjacent = indexed == list(range(indexed[0], indexed[-1] + 1))
    front = indexed[0] if adjacent else 0
    shape = call.shape()
    picked = fresh(shape[front : front + len(shape) - len(kept)], reason)
    return (*kept[:front], *picked, *kept[front:])


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


@rule("aten::constant_pad_nd", "aten::reflection_pad1d", "aten::reflection_pad2d",
      "aten::reflection_pad3d", "aten::replication_pad1d", "aten::replication_pad2d",
      "aten::replication_pad3d", "aten::pad")  # fmt: skip
def pad(call: Call) -> Layout:
    """Padded positions are new segments; padding with a constant may widen channels too."""
    x, amounts = list(call.dims("self")), list(call["pad"] or call["padding"])
    for number in range(len(amounts) // 2):
        place = len(x) - 1 - number
        before, after = amounts[2 * number], amounts[2 * number + 1]
        if not before and not after:
            continue
        if before < 0 or after < 0 or call.name != "aten::constant_pad_nd":
            freeze([x[place]], "padded or cropped")
            x[place] = leaf(call.shape()[place], "padded or cropped")
        else:
            ends = [leaf(before, "padding"), x[place], leaf(after, "padding")]
            x[place] = cat([node for node in ends if node.size])
    return tuple(x)


@rule(
    "aten::mean", "aten::sum", "aten::amax", "aten::amin", "aten::max", "aten::min", "aten::var",
    "aten::std", "aten::var_mean", "aten::std_mean", "aten::logsumexp", "aten::prod", "aten::any",
    "aten::all", "aten::norm", "aten::linalg_vector_norm", "aten::argmax", "aten::argmin",
    "aten::aminmax", "aten::nansum", "aten::nanmean", "aten::median", "aten::count_nonzero",
    "aten::square_sum",
)  # fmt: skip
def reduce(call: Call) -> list[Layout]:
    """Reduced dimensions vanish or become one wide; a position found there is a number."""
    x = call.notebook.value(call.tensors()[0]).dims
    dim = call["dim"]
    if dim is None or dim == []:
        places = set(range(len(x)))
    else:
        places = {d % max(len(x), 1) for d in ([dim] if isinstance(dim, int) else dim)}
    if call.name.rpartition("::")[2].startswith("arg"):
        freeze([x[place] for place in places], "positions are found by number")
    keep = bool(call["keepdim"])
    dims = tuple(leaf(1) if i in places else n for i, n in enumerate(x) if keep or i not in places)
    return [dims] * len(call.outputs)


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


@rule(
    "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::max_pool2d",
    "aten::max_pool1d", "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d",
    "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d", "aten::adaptive_max_pool1d", "aten::adaptive_max_pool2d",
    "aten::adaptive_max_pool3d", "aten::fractional_max_pool2d", "aten::max_pool1d_with_indices",
    "aten::mkldnn_max_pool2d", "aten::upsample_nearest1d", "aten::upsample_nearest2d",
    "aten::upsample_nearest3d", "aten::upsample_linear1d", "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d", "aten::upsample_trilinear3d", "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact2d", "aten::_upsample_nearest_exact3d",
    "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa", "aten::grid_sampler_2d",
    "aten::grid_sampler_3d", "aten::grid_sampler", "aten::cudnn_grid_sampler",
    "aten::adaptive_avg_pool3d", "aten::max_unpool2d",
)  # fmt: skip
def resample(call: Call) -> list[Layout]:
    """Batch and channels pass; positions in space are new."""
    x = call.notebook.value(call.tensors()[0]).dims
    lead = len(x) - _spatial_rank(call.name)
    return [
        (*x[:lead], *fresh(t.shape[lead:], "spatial position"))
        if tuple(t.shape[lead:]) != tuple(n.size for n in x[lead:])
        else x
        for t in call.outputs
    ]


def _spatial_rank(name: str) -> int:
    return next((n for n in (1, 2, 3) if f"{n}d" in name or f"_{n}d" in name), 2)


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle", "aten::channel_shuffle",
      "aten::native_channel_shuffle")  # fmt: skip
def shuffle(call: Call) -> Layout:
    """Channels traded for space, or groups of channels interleaved."""
    x, shape = call.dims("self"), call.shape()
    if "channel" in call.name:
        groups = int(call["groups"])
        split_by = regroup([x[1]], (groups, x[1].size // groups))
        call.symbols["groups"] = split_by[:1] if split_by else (leaf(groups),)
        mixed = prod([split_by[1], split_by[0]]) if split_by else leaf(shape[1], "shuffled")
        return (x[0], mixed, *x[2:])
    lead, space = x[:-3], fresh(shape[-2:], "spatial position")
    if "unshuffle" in call.name:
        factor = int(call["downscale_factor"]) ** 2
        return (*lead, prod([x[-3], leaf(factor, "sub-pixel")]), *space)
    factor = int(call["upscale_factor"]) ** 2
    pair = regroup([x[-3]], (shape[-3], factor))
    if pair is None:
        return (*lead, leaf(shape[-3], "sub-pixels cut across its channels"), *space)
    freeze([pair[1]], "sub-pixel")
    return (*lead, pair[0], *space)


@rule("aten::im2col", "aten::col2im")
def columns(call: Call) -> Layout:
    """Unfold and fold: ``prod(channel, kernel position)`` columns."""
    x, shape = call.dims("self"), call.shape()
    kernel = call["kernel_size"]
    taps = int(kernel[0]) * int(kernel[-1])
    if call.name == "aten::im2col":
        lead, channels = x[:-3], x[-3]
        position = leaf(shape[-1], "spatial position")
        return (*lead, prod([channels, leaf(taps, KERNEL)]), position)
    pair = regroup([x[-2]], (shape[-3], taps))
    if pair is None:
        return (*x[:-2], *fresh(shape[-3:], "columns cut across its channels"))
    freeze([pair[1]], KERNEL)
    return (*x[:-2], pair[0], *fresh(shape[-2:], "spatial position"))


@rule("aten::unfold")
def windows(call: Call) -> Layout:
    """Sliding windows over one dimension, which stays."""
    x = list(call.dims("self"))
    dim = call["dimension"] % len(x)
    freeze([x[dim]], "read through sliding windows")
    shape = call.shape()
    x[dim] = leaf(shape[dim], "read through sliding windows")
    return (*x, leaf(shape[-1], "read through sliding windows"))


@rule("aten::as_strided_")
def restrided(call: Call) -> Layout:
    """A change of memory order alone keeps the layout; anything else freezes."""
    x, shape = call.dims("self"), call.shape()
    if tuple(call["size"]) == shape == tuple(node.size for node in x):
        return x
    freeze(x, "re-read with other strides")
    return fresh(shape, "re-read with other strides")


@rule("aten::diagonal", "aten::diag_embed", "aten::as_strided", "aten::view_as_real",
      "aten::view_as_complex", "aten::_fft_r2c", "aten::_fft_c2r", "aten::_fft_c2c",
      "aten::view_dtype")  # fmt: skip
def leading(call: Call) -> Layout:
    """Leading dimensions of unchanged size pass where the last ones are re-read; those freeze."""
    x, shape = call.notebook.value(call.tensors()[0]).dims, call.shape()
    reason = f"operator {call.name} re-reads it"
    complex_view = call.name in ("aten::view_as_real", "aten::view_as_complex")
    kept = min(len(x), len(shape)) if complex_view else 0
    if "fft" in call.name:
        touched = {d % len(x) for d in call["dim"]}
        freeze([x[d] for d in touched], reason)
        return tuple(leaf(n, reason) if i in touched else x[i] for i, n in enumerate(shape))
    freeze(x[kept:], reason)
    return (*x[:kept], *fresh(shape[kept:], reason))


@rule("aten::new_zeros", "aten::new_ones", "aten::new_full", "aten::new_empty",
      "aten::new_empty_strided")  # fmt: skip
def filled(call: Call) -> Layout:
    """A new tensor of one value: its dimensions are whatever they are used with."""
    return fresh(call.shape())
