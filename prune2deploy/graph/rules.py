"""One table: ATen operator → what it does to layouts. Contractions, norms and element-wise ones.

A rule takes a ``Call`` and returns the layout of each output. It passes layouts on, unifies them,
refines them, or freezes what it does not understand. ``rule`` adds to the table; users add rules
for operators of their own with the same decorator. Shape operators live in ``rules_shape``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch

from prune2deploy.graph.layout import (
    Layout,
    Node,
    freeze,
    leaf,
    prod,
    regroup,
    unify,
)

Origin = tuple[tuple[str, int] | None, ...]
Rule = Callable[["Call"], "Layout | Sequence[Layout]"]

KERNEL = "kernel position"
"""Reason of dimensions that are not channels; they are left out of the list of axes."""

RULES: dict[str, Rule] = {}


@dataclass(eq=False)
class Value:
    """A recorded tensor.

    Attributes:
        dims: One layout term per dimension.
        origin: Per dimension, the stored tensor and dimension that it is a view of, if any.
        weight: Name of the stored tensor that it is a view of as a whole, if any.
        constant: The tensor itself where it is neither stored nor computed.
        residual: Numbers of the values that reach this one through additions alone.
    """

    dims: Layout
    origin: Origin = ()
    weight: str | None = None
    constant: torch.Tensor | None = None
    residual: frozenset[int] = frozenset()


class Notebook(Protocol):
    """What a rule may tell the recorder."""

    recording: Any

    def value(self, tensor: torch.Tensor) -> Value:
        """The recorded value of a tensor."""

    def number(self, tensor: torch.Tensor) -> int:
        """Its number."""

    def contraction(self, kind: str, weight: Value | None, widths: tuple[Layout, ...]) -> None:
        """Note a contraction."""


class Call:
    """One operator call as a rule sees it: arguments by schema name, layouts of tensors.

    A rule notes in ``symbols`` which number arguments are widths, so that they can be computed
    again for a pruned model.
    """

    def __init__(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: list[torch.Tensor],
        notebook: Notebook,
    ) -> None:  # fmt: skip
        self.func = func
        self.outputs = outputs
        self.notebook = notebook
        self.symbols: dict[str, Layout] = {}
        self._args = args
        self._kwargs = kwargs
        self._places, self._defaults = _signature(func)

    @property
    def name(self) -> str:
        """Qualified operator name without overload (``aten::add``)."""
        return str(self.func._schema.name)

    def __getitem__(self, name: str) -> Any:
        """The argument of that name in the operator's schema, or its default."""
        place = self._places.get(name)
        if place is not None and place < len(self._args):
            return self._args[place]
        return self._kwargs.get(name, self._defaults.get(name))

    def value(self, name: str) -> Value:
        """The recorded value of a tensor argument."""
        return self.notebook.value(self[name])

    def dims(self, name: str) -> Layout:
        """The layout of a tensor argument; empty when it is None."""
        tensor = self[name]
        return self.notebook.value(tensor).dims if isinstance(tensor, torch.Tensor) else ()

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, those in lists included."""
        found = []
        for arg in (*self._args, *self._kwargs.values()):
            if isinstance(arg, torch.Tensor):
                found.append(arg)
            elif isinstance(arg, list | tuple):
                found += [item for item in arg if isinstance(item, torch.Tensor)]
        return found

    def shape(self, index: int = 0) -> tuple[int, ...]:
        """The shape of an output."""
        return tuple(self.outputs[index].shape)

    def role(self, name: str, dim: int, role: str) -> None:
        """Mark a weight's dimension as making (``out``) or consuming (``in``) channels."""
        origin = self.value(name).origin
        if origin and origin[dim] is not None:
            self.notebook.recording.roles.setdefault(origin[dim], role)


@cache
def _signature(func: Any) -> tuple[dict[str, int], dict[str, Any]]:
    places, defaults = {}, {}
    for place, argument in enumerate(func._schema.arguments):
        if not argument.kwarg_only:
            places[argument.name] = place
        defaults[argument.name] = argument.default_value
    return places, defaults


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Add a rule for operators, given by qualified name (``aten::add``, ``mylib::myop``).

    Example:
        >>> @rule("mylib::scale_channels")
        ... def scale_channels(call):
        ...     unify(call.dims("x")[1], call.dims("scale")[0])
        ...     return call.dims("x")
    """

    def add(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, function))
        return function

    return add


def apply_rule(call: Call) -> list[Value]:
    """The value of every output of ``call``; an operator without a rule freezes what it touches."""
    if not call.outputs:
        return []
    found = RULES.get(call.name)
    if not call.tensors():
        reason = None if call.name in FILLED else f"numbers made by {call.name}"
        return [Value(fresh(tensor.shape, reason)) for tensor in call.outputs]
    if found is None:
        found = pointwise if torch.Tag.pointwise in call.func.tags else _unknown
    result = found(call)
    layouts = cast("Sequence[Layout]", [result] if _is_layout(result) else result)
    values = []
    for tensor, dims in zip(call.outputs, layouts, strict=True):
        sizes = tuple(node.size for node in dims)
        assert sizes == tuple(tensor.shape), (call.name, sizes, tuple(tensor.shape))
        values.append(Value(dims))
        carry(call, values[-1])
    return values


def _is_layout(result: Layout | Sequence[Layout]) -> bool:
    return isinstance(result, tuple) and all(isinstance(node, Node) for node in result)


FILLED = frozenset({"aten::zeros", "aten::ones", "aten::full", "aten::empty"})
ADDITIONS = frozenset({"aten::add", "aten::add_"})
COPIES = frozenset({"aten::clone", "aten::detach", "aten::alias", "aten::_to_copy"})
PARTS = frozenset({"aten::split", "aten::split_with_sizes", "aten::slice", "aten::chunk"})
TURNS = frozenset({"aten::t", "aten::transpose", "aten::permute"})


def carry(call: Call, value: Value) -> None:
    """Remember what reaches a value through additions, and which stored tensor it is a view of."""
    tensors = call.tensors()
    if call.name in ADDITIONS:
        for tensor in tensors:
            number = call.notebook.number(tensor)
            value.residual |= call.notebook.value(tensor).residual | {number}
    elif len(tensors) == 1 and call.name in COPIES | PARTS | TURNS:
        source = call.notebook.value(tensors[0])
        value.origin, value.weight = source.origin, source.weight
        if call.name in TURNS and source.origin:
            value.origin = tuple(source.origin[place] for place in turn(call, len(source.dims)))
        if call.name in COPIES:
            value.residual = source.residual
    elif len(tensors) == 1 and torch.Tag.pointwise in call.func.tags:
        value.residual = call.notebook.value(tensors[0]).residual


def turn(call: Call, rank: int) -> list[int]:
    """Where each output dimension of a transposition comes from."""
    places = list(range(rank))
    if call.name == "aten::permute":
        return [place % rank for place in call["dims"]]
    if call.name == "aten::t":
        return places[::-1]
    a, b = call["dim0"] % max(rank, 1), call["dim1"] % max(rank, 1)
    if rank:
        places[a], places[b] = b, a
    return places


def fresh(shape: Sequence[int], reason: str | None = None) -> Layout:
    """New leaves for a shape."""
    return tuple(leaf(n, reason) for n in shape)


def _unknown(call: Call) -> list[Layout]:
    counts = call.notebook.recording.unknown
    counts[call.name] = counts.get(call.name, 0) + 1
    return give_up(call, f"operator {call.name} has no rule")


def give_up(call: Call, reason: str) -> list[Layout]:
    """Freeze everything that an operator touches."""
    for tensor in call.tensors():
        freeze(call.notebook.value(tensor).dims, reason)
    return [fresh(tensor.shape, reason) for tensor in call.outputs]


def broadcast(layouts: Sequence[Layout]) -> Layout:
    """Unify layouts dimension by dimension from the right, as broadcasting does."""
    rank = max(len(dims) for dims in layouts)
    result = []
    for place in range(1, rank + 1):
        present = [dims[-place] for dims in layouts if len(dims) >= place]
        wide = [node for node in present if node.size != 1]
        for other in wide[1:]:
            unify(wide[0], other)
        result.append(wide[0] if wide else present[0])
    return tuple(reversed(result))


def pointwise(call: Call) -> list[Layout]:
    """Any operator that PyTorch tags as element-wise: its tensors share all dimensions."""
    dims = broadcast([call.notebook.value(tensor).dims for tensor in call.tensors()])
    return [dims] * len(call.outputs)


@rule("aten::copy_", "aten::fill_", "aten::masked_fill_", "aten::lerp_")
def copy_in(call: Call) -> Layout:
    """Write into a tensor: the source is broadcast to it."""
    return broadcast([call.notebook.value(tensor).dims for tensor in call.tensors()])


@rule(
    "aten::native_dropout", "aten::_softmax", "aten::_log_softmax", "aten::cumsum", "aten::tril",
    "aten::triu", "aten::flip", "aten::roll", "aten::cumprod", "aten::logcumsumexp", "aten::tril_",
    "aten::triu_", "aten::_safe_softmax", "aten::bernoulli_", "aten::bernoulli", "aten::normal_",
    "aten::uniform_", "aten::zero_", "aten::_to_copy", "aten::clone", "aten::detach",
    "aten::alias", "aten::lift_fresh", "aten::zeros_like", "aten::ones_like", "aten::full_like",
    "aten::empty_like", "aten::randn_like",
    "aten::contiguous", "aten::detach_", "aten::lift_fresh_copy", "aten::exponential_",
    "aten::random_", "aten::_conj", "aten::rand_like", "aten::randint_like",
)  # fmt: skip
def same(call: Call) -> list[Layout]:
    """Outputs have the layout of the first tensor."""
    dims = call.notebook.value(call.tensors()[0]).dims
    return [dims] * len(call.outputs)


@rule("aten::_prelu_kernel", "aten::prelu")
def prelu(call: Call) -> Layout:
    """One slope per channel (or a single one), already broadcast by the caller."""
    x, weight = call.dims("self"), call.dims("weight")
    if len(weight) == 1 and weight[0].size != 1:
        unify(x[1], weight[0])
    elif len(weight) > 1:
        broadcast([x, weight])
    return x


@rule("aten::convolution", "aten::_convolution", "aten::cudnn_convolution",
      "aten::mkldnn_convolution", "aten::convolution_overrideable")  # fmt: skip
def convolution(call: Call) -> Layout:
    """Convolution of any rank, grouped or not, transposed or not.

    With groups the channels are ``prod(group, channel)`` on both sides: whole groups may go, or
    equally many channels of each group.
    """
    x, weight = call.dims("input"), call.dims("weight")
    transposed, groups = bool(call["transposed"]), int(call["groups"])
    freeze(weight[2:], KERNEL)
    made, used = (1, 0) if transposed else (0, 1)
    call.role("weight", made, "out")
    call.role("weight", used, "in")
    batch, channels = (x[0], x[1]) if len(x) == len(weight) else (None, x[0])
    out, inner = _couple_groups(channels, weight, groups, transposed=transposed)
    if groups > 1:
        call.symbols["groups"] = (
            regroup([channels], (groups, channels.size // groups)) or (leaf(groups),)
        )[:1]
    bias = call.dims("bias")
    if bias:
        unify(bias[0], out)
    shape = call.shape()
    space = fresh(shape[-(len(weight) - 2) :], "spatial position")
    result = (out, *space) if batch is None else (batch, out, *space)
    pixels = x[-(len(weight) - 2) :] if transposed else space
    # a transposed convolution visits every input pixel: its own output width per group counts
    outer, per_group = (channels, weight[1]) if transposed else (out, inner)
    macs = (*(() if batch is None else (batch,)), *pixels, *weight[2:], outer, per_group)
    call.notebook.contraction("convolution", call.value("weight"), ((channels,), (out,), macs))
    return result


def _couple_groups(
    channels: Node, weight: Layout, groups: int, *, transposed: bool
) -> tuple[Node, Node]:
    """Unify input channels, weight and groups; the output channels and the contracted width."""
    if groups == 1:
        unify(channels, weight[0] if transposed else weight[1])
        return (weight[1], weight[0]) if transposed else (weight[0], weight[1])
    size_in = channels.size // groups
    size_out = weight[1].size if transposed else weight[0].size // groups
    split_in = regroup([channels], (groups, size_in))
    split_weight = regroup([weight[0]], (groups, size_in if transposed else size_out))
    if split_in is None or split_weight is None:
        freeze([channels, *weight[:2]], "groups cut across its channels")
        return leaf(groups * size_out, "groups cut across its channels"), weight[1]
    unify(split_in[0], split_weight[0])
    if transposed:
        unify(split_in[1], split_weight[1])
        return prod([split_weight[0], weight[1]]), weight[0]
    unify(split_in[1], weight[1])
    return weight[0], weight[1]


def _matmul(call: Call, a: str, b: str, bias: str | None = None) -> Layout:
    """``a`` (…, m, k) times ``b`` (…, k, n), batch dimensions unified."""
    left, right = call.dims(a), call.dims(b)
    unify(left[-1], right[-2])
    for x, y in zip(left[:-2], right[:-2], strict=True):
        unify(x, y)
    result = (*left[:-1], right[-1])
    if bias is not None:
        broadcast([result, call.dims(bias)])
    weight = call.value(b) if call.value(b).weight else None
    call.role(b, -2, "in")
    call.role(b, -1, "out")
    call.role(a, -1, "in")
    kind = "linear" if weight else "matmul"
    macs = (*left, right[-1])
    call.notebook.contraction(kind, weight, ((left[-1],), (right[-1],), macs))
    return result


@rule("aten::mm")
def mm(call: Call) -> Layout:
    """Matrix product."""
    return _matmul(call, "self", "mat2")


@rule("aten::bmm")
def bmm(call: Call) -> Layout:
    """Batched matrix product."""
    return _matmul(call, "self", "mat2")


@rule("aten::addmm", "aten::addmm_")
def addmm(call: Call) -> Layout:
    """Matrix product plus bias."""
    return _matmul(call, "mat1", "mat2", "self")


@rule("aten::baddbmm", "aten::baddbmm_")
def baddbmm(call: Call) -> Layout:
    """Batched matrix product plus bias."""
    return _matmul(call, "batch1", "batch2", "self")


@rule("aten::linear")
def linear(call: Call) -> Layout:
    """``x @ weight.T + bias`` where it is not decomposed."""
    x, weight, bias = call.dims("input"), call.dims("weight"), call.dims("bias")
    unify(x[-1], weight[1])
    if bias:
        unify(bias[0], weight[0])
    call.role("weight", 0, "out")
    call.role("weight", 1, "in")
    widths = ((x[-1],), (weight[0],), (*x, weight[0]))
    call.notebook.contraction("linear", call.value("weight"), widths)
    return (*x[:-1], weight[0])


@rule("aten::mv", "aten::addmv")
def mv(call: Call) -> Layout:
    """Matrix times vector."""
    matrix = call.dims("self") if call.name == "aten::mv" else call.dims("mat")
    unify(matrix[1], call.dims("vec")[0])
    return (matrix[0],)


@rule("aten::dot", "aten::vdot")
def dot(call: Call) -> Layout:
    """Inner product of two vectors."""
    unify(call.dims("self")[0], call.dims("tensor" if call.name == "aten::dot" else "other")[0])
    return ()


@rule(
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_scaled_dot_product_fused_attention_overrideable",
    "aten::_scaled_dot_product_attention_math",
    "aten::_scaled_dot_product_attention_math_for_mps",
    "aten::scaled_dot_product_attention",
)
def attention(call: Call) -> list[Layout]:
    """Fused attention: q (…, L, E), k (…, S, E), v (…, S, D) → (…, L, D)."""
    q, k, v = call.dims("query"), call.dims("key"), call.dims("value")
    unify(q[-1], k[-1])
    unify(k[-2], v[-2])
    for place in range(len(q) - 2):
        unify(q[place], k[place])
        unify(q[place], v[place])
    for name in ("attn_mask", "attn_bias"):
        mask = call.dims(name)
        if mask:
            broadcast([(*q[:-1], k[-2]), mask])
    note = call.notebook.contraction
    note("matmul", None, ((q[-1],), (k[-2],), (*q, k[-2])))
    note("matmul", None, ((v[-2],), (v[-1],), (*q[:-1], *v[-2:])))
    result = (*q[:-1], v[-1])
    return [result, *(fresh(t.shape, "attention by-product") for t in call.outputs[1:])]


@rule(
    "aten::native_batch_norm", "aten::_native_batch_norm_legit", "aten::cudnn_batch_norm",
    "aten::_native_batch_norm_legit_no_training", "aten::batch_norm", "aten::miopen_batch_norm",
    "aten::_batch_norm_with_update", "aten::_batch_norm_no_update", "aten::native_instance_norm",
    "aten::batch_norm_with_update",
)  # fmt: skip
def batch_norm(call: Call) -> list[Layout]:
    """Per-channel parameters and statistics go with dimension one."""
    x = call.notebook.value(call.tensors()[0]).dims
    for tensor in call.tensors()[1:]:
        unify(call.notebook.value(tensor).dims[0], x[1])
    return [x, *(_statistics(t, x[1]) for t in call.outputs[1:])]


def _statistics(tensor: torch.Tensor, channels: Node) -> Layout:
    shape = tuple(tensor.shape)
    return (channels,) if shape == (channels.size,) else fresh(shape, "batch statistics")


@rule("aten::native_layer_norm", "aten::_fused_rms_norm", "aten::rms_norm", "aten::layer_norm")
def layer_norm(call: Call) -> list[Layout]:
    """Normalised dimensions share their layout with the affine parameters."""
    x = call.dims("input")
    for name in ("weight", "bias"):
        for node, own in zip(x[-len(call["normalized_shape"]) :], call.dims(name), strict=False):
            unify(node, own)
    call.symbols["normalized_shape"] = x[-len(call["normalized_shape"]) :]
    return [x, *(_reduced(t, x) for t in call.outputs[1:])]


def _reduced(tensor: torch.Tensor, x: Layout) -> Layout:
    return tuple(
        leaf(n, "statistics") if n != node.size else node
        for n, node in zip(tensor.shape, x, strict=False)
    )


@rule("aten::native_group_norm", "aten::group_norm")
def group_norm(call: Call) -> list[Layout]:
    """Channels are ``prod(group, channel)``; the affine parameters go with them."""
    x, groups = call.dims("input"), int(call["group"])
    split = regroup([x[1]], (groups, x[1].size // groups))
    if split is None:
        freeze([x[1]], "groups cut across its channels")
    else:
        call.symbols["group"] = call.symbols["num_groups"] = (split[0],)
    call.symbols["C"] = (x[1],)
    for name in ("weight", "bias"):
        for own in call.dims(name):
            unify(x[1], own)
    statistics = (x[0], split[0]) if split else fresh((x[0].size, groups))
    return [x, *[statistics] * len(call.outputs[1:])]


@rule("aten::_weight_norm_interface", "aten::_weight_norm")
def weight_norm(call: Call) -> list[Layout]:
    """``g * v / |v|``: the result has the layout of v; g shares the dimension that it scales."""
    v, g = call.dims("v"), call.dims("g")
    broadcast([v, g])
    return [v, *(_reduced(t, v) for t in call.outputs[1:])]


@rule("aten::embedding")
def embedding(call: Call) -> Layout:
    """Rows picked by number stay; the width is free."""
    weight = call.dims("weight")
    freeze(weight[:1], "rows are picked by number")
    call.role("weight", 1, "out")
    return (*call.dims("indices"), weight[1])
