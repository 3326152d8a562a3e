"""Rules for operators over positions in space: padding, pooling, resizing, windows, re-reading."""

from __future__ import annotations

from collections.abc import Sequence

from prune2deploy.graph.layout import Layout, cat, freeze, leaf, prod, regroup, unify
from prune2deploy.graph.rules import ACROSS_GROUPS, KERNEL, Call, broadcast, fresh, rule


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
    "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices", "aten::max_pool2d",
    "aten::max_pool1d", "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d",
    "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_avg_pool1d",
    "aten::adaptive_avg_pool2d", "aten::adaptive_max_pool1d", "aten::adaptive_max_pool2d",
    "aten::adaptive_max_pool3d", "aten::fractional_max_pool2d", "aten::max_pool1d_with_indices",
    "aten::mkldnn_max_pool2d", "aten::upsample_nearest1d", "aten::upsample_nearest2d",
    "aten::upsample_nearest3d", "aten::upsample_linear1d", "aten::upsample_bilinear2d",
    "aten::upsample_bicubic2d", "aten::upsample_trilinear3d", "aten::_upsample_nearest_exact1d",
    "aten::_upsample_nearest_exact2d", "aten::_upsample_nearest_exact3d",
    "aten::_upsample_bilinear2d_aa", "aten::_upsample_bicubic2d_aa",
    "aten::adaptive_avg_pool3d",
)  # fmt: skip
def resample(call: Call) -> list[Layout]:
    """Batch and channels pass; positions in space are new."""
    x = call.notebook.value(call.tensors()[0]).dims
    lead = len(x) - _spatial_rank(call.name)
    freeze(x[lead:], "read through a kernel")
    return [
        (*x[:lead], *fresh(t.shape[lead:], "spatial position"))
        if tuple(t.shape[lead:]) != tuple(n.size for n in x[lead:])
        else x
        for t in call.outputs
    ]


@rule("aten::max_unpool2d", "aten::max_unpool3d")
def unpooled(call: Call) -> Layout | Sequence[Layout]:
    """Each value goes where its own index says, so that values and indices share channels."""
    broadcast([call.dims("self"), call.dims("indices")])
    return resample(call)


def _spatial_rank(name: str) -> int:
    return next((n for n in (1, 2, 3) if f"{n}d" in name or f"_{n}d" in name), 2)


@rule("aten::pixel_shuffle", "aten::pixel_unshuffle", "aten::channel_shuffle",
      "aten::native_channel_shuffle")  # fmt: skip
def shuffle(call: Call) -> Layout:
    """Channels traded for space, or groups of channels interleaved."""
    x, shape = call.dims("self"), call.shape()
    if "channel" in call.name:
        groups = int(call["groups"])
        split_by = regroup([x[1]], (groups, x[1].size // groups), ACROSS_GROUPS)
        call.symbols["groups"] = split_by[:1] if split_by else (leaf(groups),)
        mixed = prod([split_by[1], split_by[0]]) if split_by else leaf(shape[1], "shuffled")
        return (x[0], mixed, *x[2:])
    freeze(x[-2:], "traded for channels")
    lead, space = x[:-3], fresh(shape[-2:], "spatial position")
    if "unshuffle" in call.name:
        factor = int(call["downscale_factor"]) ** 2
        return (*lead, prod([x[-3], leaf(factor, "sub-pixel")]), *space)
    factor = int(call["upscale_factor"]) ** 2
    pair = regroup([x[-3]], (shape[-3], factor), "sub-pixels cut across its channels")
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
        freeze(x[-2:], "read through a kernel")
        position = leaf(shape[-1], "spatial position")
        return (*lead, prod([channels, leaf(taps, KERNEL)]), position)
    pair = regroup([x[-2]], (shape[-3], taps), "columns cut across its channels")
    if pair is None:
        return (*x[:-2], *fresh(shape[-3:], "columns cut across its channels"))
    freeze([pair[1]], KERNEL)
    freeze(x[-1:], "read through a kernel")
    return (*x[:-2], pair[0], *fresh(shape[-2:], "spatial position"))


@rule("aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler",
      "aten::cudnn_grid_sampler")  # fmt: skip
def sampled(call: Call) -> Layout:
    """Channels are read at the points of a grid: the result has the grid's dimensions."""
    x, grid = (call.notebook.value(tensor).dims for tensor in call.tensors()[:2])
    unify(x[0], grid[0])
    freeze([*x[2:], grid[-1]], "positions to read at")
    return (x[0], x[1], *grid[1:-1])


@rule("torchvision::roi_align", "torchvision::roi_pool")
def regions(call: Call) -> list[Layout]:
    """One output for each region (rows of the second tensor); channels pass."""
    x, rois = call.dims("input"), call.dims("rois")
    freeze([*x[2:], rois[1]], "read through regions")
    return [(rois[0], x[1], *fresh(t.shape[2:], "spatial position")) for t in call.outputs]


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


@rule("aten::diagonal", "aten::diagonal_copy", "aten::diag_embed")
def diagonal(call: Call) -> Layout | Sequence[Layout]:
    """The main diagonal of two dimensions that hold the same channels, read or written."""
    x, places = list(call.dims("self")), (call["dim1"], call["dim2"])
    if call["offset"]:
        return leading(call)
    if call.name == "aten::diag_embed":
        rank = len(x) + 1
        made = x.pop()
        for place in sorted(place % rank for place in places):
            x.insert(place, made)
        return tuple(x)
    low, high = sorted(place % len(x) for place in places)
    if x[low].size != x[high].size:
        return leading(call)
    unify(x[low], x[high])
    node = x.pop(high)
    del x[low]
    return (*x, node)


@rule("aten::as_strided", "aten::view_as_real", "aten::view_as_complex", "aten::_fft_r2c",
      "aten::_fft_c2r", "aten::_fft_c2c", "aten::view_dtype")  # fmt: skip
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
