"""How each recorded operator is written in a captured module.

In: an operator as it was recorded and a writer. Out: nodes of an ``fx.Graph`` that take gradients,
export to ONNX and have every width computed from the layouts instead of spelt out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import fx
from torch.nn import functional as F

from prune2deploy.graph.layout import Layout, Node, factors, find, leaves, prod
from prune2deploy.graph.recording import Operation, Recording, Ref
from prune2deploy.graph.rules import argument
from prune2deploy.graph.visible import ATTENTION

Argument = Any


class Writer(Protocol):
    """What a spelling may ask of the writer of a captured module."""

    graph: fx.Graph
    recording: Recording
    reads: Counter[int]
    scales: Mapping[int, float]

    def value(self, number: int) -> Argument:
        """The node of a recorded value."""

    def argument(self, tree: Any) -> Argument:
        """Arguments with references replaced by nodes."""

    def size(self, node: Node) -> Argument:
        """A width, as a number or as a node."""

    def sizes(self, dims: Layout) -> list[Argument]:
        """Sizes of a layout."""

    def device(self) -> Argument:
        """Where the first input lies, for tensors that the code makes."""

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """Append a function call; references in the arguments are replaced."""


def as_recorded(writer: Writer, operation: Operation) -> fx.Node:
    """The same overload with the same arguments; widths that the rule noted are computed."""
    args, kwargs = list(operation.args), dict(operation.kwargs)
    for place, entry in enumerate(operation.func._schema.arguments):
        terms = operation.symbols.get(entry.name)
        if terms is None:
            continue
        new: Any = writer.sizes(terms)
        if not isinstance(given(operation, entry.name), list):
            new = sum(new) if all(isinstance(size, int) for size in new) else new[0]
        if place < len(args):
            args[place] = new
        else:
            kwargs[entry.name] = new
    if kwargs.get("device") is not None:
        kwargs["device"] = writer.device()
    return writer.call(operation.func, *args, **kwargs)


def given(operation: Operation, name: str) -> Any:
    """An argument by its name in the schema."""
    return argument(operation.func, operation.args, operation.kwargs, name)


def _view(writer: Writer, operation: Operation) -> fx.Node:
    """The same elements in other dimensions, or read as another type."""
    if given(operation, "dtype") is not None:
        return as_recorded(writer, operation)
    sizes = writer.sizes(operation.layouts[0])
    return writer.call(torch.reshape, operation.args[0], sizes)


def _squeezed(writer: Writer, operation: Operation) -> fx.Node:
    """Dimensions that are one wide after pruning only stay."""
    dims = writer.recording.values[operation.args[0].number].dims
    free = [node for node in dims if not any(below.frozen for below in leaves(node))]
    if any(writer.size(node) == 1 for node in free if find(node).size > 1):
        return _view(writer, operation)
    return as_recorded(writer, operation)


def _expand(writer: Writer, operation: Operation) -> fx.Node:
    sizes = writer.sizes(operation.layouts[0])
    return writer.call(torch.ops.aten.expand.default, operation.args[0], sizes)


def _split(writer: Writer, operation: Operation) -> fx.Node:
    dim = given(operation, "dim")
    sizes = [writer.size(dims[dim]) for dims in operation.layouts]
    unsafe = "unsafe" in operation.name  # parts that may be written to in place
    kind = torch.ops.aten.unsafe_split_with_sizes if unsafe else torch.ops.aten.split_with_sizes
    return writer.call(kind.default, operation.args[0], sizes, dim)


FACTORIES = {
    "aten::new_zeros": torch.ops.aten.zeros.default,
    "aten::new_ones": torch.ops.aten.ones.default,
    "aten::new_empty": torch.ops.aten.empty.memory_format,
    "aten::new_full": torch.ops.aten.full.default,
}


def _filled(writer: Writer, operation: Operation) -> fx.Node:
    args = list(operation.args)
    kwargs = dict(operation.kwargs)
    function = operation.func
    if isinstance(args.pop(0), Ref):  # of the type and on the device of another tensor
        args.pop(0)
        function = FACTORIES[function._schema.name]
        kwargs = {"dtype": writer.recording.values[operation.outputs[0]].dtype, "device": True}
    args.insert(0, writer.sizes(operation.layouts[0]))
    if kwargs.get("device") is not None:
        kwargs["device"] = writer.device()
    return writer.call(function, *args, **kwargs)


def _arange(writer: Writer, operation: Operation) -> fx.Node:
    """Numbers that count the batch follow it."""
    size = writer.size(operation.layouts[0][0])
    first, step = given(operation, "start") or 0, given(operation, "step") or 1
    if isinstance(size, int) or first != 0 or step != 1:
        return as_recorded(writer, operation)
    settings = {"dtype": given(operation, "dtype"), "device": writer.device()}
    return writer.call(torch.arange, size, **settings)


def _batch_norm(writer: Writer, operation: Operation) -> fx.Node:
    stored = {name: given(operation, name) for name in ("running_mean", "weight", "bias")}
    training = writer.graph.get_attr("training") if stored["running_mean"] is not None else True
    epsilon = given(operation, "eps")
    return writer.call(
        F.batch_norm,
        given(operation, "input"),
        stored["running_mean"],
        given(operation, "running_var"),
        stored["weight"],
        stored["bias"],
        training,
        given(operation, "momentum"),
        given(operation, "epsilon") if epsilon is None else epsilon,
    )


def _layer_norm(writer: Writer, operation: Operation) -> fx.Node:
    shape = writer.sizes(operation.symbols["normalized_shape"])
    found = [given(operation, name) for name in ("weight", "bias", "eps")]
    return writer.call(F.layer_norm, operation.args[0], shape, *found)


def _group_norm(writer: Writer, operation: Operation) -> fx.Node:
    groups = operation.symbols.get("group")
    count = writer.size(groups[0]) if groups else given(operation, "group")
    found = [given(operation, name) for name in ("weight", "bias", "eps")]
    return writer.call(F.group_norm, operation.args[0], count, *found)


def _attention(writer: Writer, operation: Operation) -> fx.Node:
    mask = given(operation, "attn_mask")
    mask = given(operation, "attn_bias") if mask is None else mask
    q, k, v = (_every_head(writer, operation, place) for place in range(3))
    scale = writer.scales.get(operation.outputs[0], given(operation, "scale"))
    return writer.call(
        F.scaled_dot_product_attention, q, k, v, mask, 0.0, bool(given(operation, "is_causal")),
        scale=scale,
    )  # fmt: skip


def _every_head(writer: Writer, operation: Operation, place: int) -> Argument:
    """Queries, keys or values; those of fewer heads are repeated for the heads that share them."""
    ref = operation.args[place]
    own, all_heads = (
        find(writer.recording.values[operation.args[at].number].dims[-3]) for at in (place, 0)
    )
    if own.size == all_heads.size:
        return ref
    copies = all_heads
    for factor in factors(own):
        rest = [f for f in factors(copies) if f is not factor]
        copies = prod(rest)
    return writer.call(torch.repeat_interleave, ref, writer.size(copies), -3)


def _embedding_bag(writer: Writer, operation: Operation) -> fx.Node:
    weight, indices, offsets = operation.args[:3]
    padding = given(operation, "padding_idx")
    names = ("scale_grad_by_freq", "sparse", "per_sample_weights", "include_last_offset")
    return writer.call(
        F.embedding_bag, indices, weight, offsets,
        mode=("sum", "mean", "max")[given(operation, "mode")],
        padding_idx=None if padding < 0 else padding,
        **{name: given(operation, name) for name in names},
    )  # fmt: skip


def _softmax(writer: Writer, operation: Operation) -> fx.Node:
    name = operation.name
    x, dim = operation.args[:2]
    result = writer.call(torch.log_softmax if "log" in name else torch.softmax, x, dim)
    if "safe" in name:  # rows that are masked as a whole become zero
        masked = writer.call(torch.all, writer.call(torch.eq, x, float("-inf")), dim, True)
        return writer.call(torch.masked_fill, result, masked, 0.0)
    return result


def _max_pool(writer: Writer, operation: Operation) -> fx.Node:
    function = F.max_pool3d if "3d" in operation.name else F.max_pool2d
    names = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
    found = (given(operation, n) or _none(n) for n in names)
    indices = bool(writer.reads[operation.outputs[1]])
    return writer.call(function, operation.args[0], *found, return_indices=indices)


def _none(name: str) -> Any:
    return {"stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}[name]


def _adaptive_pool(writer: Writer, operation: Operation) -> fx.Node:
    deep = "3d" in operation.name
    function = F.adaptive_avg_pool3d if deep else F.adaptive_avg_pool2d
    return writer.call(function, *operation.args[:2])


def _copied(writer: Writer, operation: Operation) -> fx.Node:
    """A change of type, or a copy where there is none; the device stays that of the tensor."""
    source, kind = operation.args[0], given(operation, "dtype")
    if kind in (None, writer.recording.values[source.number].dtype):
        return writer.call(torch.ops.aten.clone.default, source)
    return writer.graph.call_method("to", (writer.argument(source),), {"dtype": kind})


def _resized(writer: Writer, operation: Operation) -> fx.Node:
    name = operation.name.removeprefix("aten::")
    kind, _, rest = name.removeprefix("_").removeprefix("upsample_").rpartition("d")
    mode = kind[:-1].replace("_", "-")  # without the rank: bilinear2d, nearest_exact1d
    factors_given, size = given(operation, "scale_factors"), given(operation, "output_size")
    settings: dict[str, Any] = {"size": size} if size else {"scale_factor": list(factors_given)}
    if given(operation, "align_corners"):
        settings["align_corners"] = True
    if rest == "_aa":
        settings["antialias"] = True
    return writer.call(F.interpolate, operation.args[0], mode=mode, **settings)


def _sampled(writer: Writer, operation: Operation) -> fx.Node:
    x, grid, mode, padding, corners = operation.args[:5]
    modes, paddings = ("bilinear", "nearest", "bicubic"), ("zeros", "border", "reflection")
    return writer.call(F.grid_sample, x, grid, modes[mode], paddings[padding], corners)


def _dropout(writer: Writer, operation: Operation) -> fx.Node:
    """Drops again while the captured module trains."""
    x, p, kind = operation.args
    return writer.call(getattr(F, kind), x, p, writer.graph.get_attr("training"))


def _identity(writer: Writer, operation: Operation) -> Argument:
    return writer.argument(operation.args[0])


_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training",
    "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_no_update", "_batch_norm_with_update",
)  # fmt: skip
_BAGS = ("_embedding_bag", "_embedding_bag_forward_only")
_ATTENTIONS = (
    "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math", "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip

_RESIZING = (
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "upsample_linear1d",
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d",
    "_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d",
    "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa",
)  # fmt: skip

_ATEN: dict[str, Callable[[Writer, Operation], Argument]] = {
    f"aten::{name}": spelling
    for names, spelling in (
        (("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy"), _view),
        (("squeeze",), _squeezed),
        (("expand",), _expand),
        (("arange",), _arange),
        (("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"), _split),
        (
            ("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty"),
            _filled,
        ),
        (_NORMS, _batch_norm),
        (("native_layer_norm",), _layer_norm),
        (("native_group_norm",), _group_norm),
        (_ATTENTIONS, _attention),
        (_BAGS, _embedding_bag),
        (("_softmax", "_log_softmax", "_safe_softmax"), _softmax),
        (("max_pool2d_with_indices", "max_pool3d_with_indices"), _max_pool),
        (("_adaptive_avg_pool2d", "_adaptive_avg_pool3d"), _adaptive_pool),
        (("lift_fresh",), _identity),
        (("_to_copy",), _copied),
        (_RESIZING, _resized),
        (("grid_sampler_2d", "grid_sampler_3d", "grid_sampler"), _sampled),
    )
    for name in names
}


SPELLINGS = {**_ATEN, "prune2deploy::dropout": _dropout, ATTENTION: _attention}
"""Operators written in the form that has gradients, exporters and size arguments."""

ATTENTIONS = frozenset({ATTENTION, *(f"aten::{name}" for name in _ATTENTIONS)})
"""Operators that compute a softmax over products of queries and keys."""

POOLS = frozenset({"aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices"})
"""Operators whose second result is there where something reads it."""

FIRST_ONLY = POOLS | frozenset(
    f"aten::{name}"
    for name in (*_NORMS, *_ATTENTIONS, *_BAGS, "native_layer_norm", "native_group_norm")
)
"""Operators of which only the first result is used once they are spelt as functions."""
