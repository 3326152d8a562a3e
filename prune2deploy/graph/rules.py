"""One table: ATen operator → what it does to layouts. Contractions, norms and element-wise ones.

A rule takes a ``Call`` and returns the layout of each output. It passes layouts on, unifies them,
refines them, or freezes what it does not understand. ``rule`` adds to the table; users add rules
for operators of their own with the same decorator. Shape operators live in ``rules_shape``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol, cast

import torch
from torch import nn

from prune2deploy.errors import TraceError
from prune2deploy.graph.layout import (
    Layout,
    Node,
    freeze,
    leaf,
    unify,
)
from prune2deploy.graph.visible import LEAVE

Origin = tuple[tuple[str, int] | None, ...]
Rule = Callable[["Call"], "Layout | Sequence[Layout]"]

KERNEL = "kernel position"
"""Reason of dimensions that are not channels; they are left out of the list of axes."""

ACROSS_GROUPS = "groups cut across its channels"
"""Reason of channels that groups do not divide."""

CATEGORIES = "categories of a softmax"
"""Reason of dimensions whose positions share a distribution."""

RULES: dict[str, Rule] = {}
"""Operator → rule."""

MODULE_RULES: dict[type[nn.Module], Rule] = {}
"""Class of modules → rule for their calls as a whole; none but those that users add."""


@dataclass(eq=False)
class Value:
    """A recorded tensor.

    Attributes:
        dims: One layout term per dimension.
        origin: Per dimension, the stored tensor and dimension that it is a view of, if any.
        weight: Name of the stored tensor that it is a view of as a whole, if any.
        constant: The tensor itself where it is neither stored nor computed.
        residual: Numbers of the values that reach this one through additions alone.
        dtype: Its element type.
    """

    dims: Layout
    origin: Origin = ()
    weight: str | None = None
    constant: torch.Tensor | None = None
    residual: frozenset[int] = frozenset()
    dtype: torch.dtype | None = None


class Notebook(Protocol):
    """What a rule may tell the recorder."""

    recording: Any

    def value(self, tensor: torch.Tensor) -> Value:
        """The recorded value of a tensor."""

    def number(self, tensor: torch.Tensor) -> int:
        """Its number."""

    def contraction(self, kind: str, weight: Value | None, widths: tuple[Layout, ...]) -> None:
        """Note a contraction."""

    def freeze_if_read(self, tensor: torch.Tensor, dims: Layout, reason: str) -> None:
        """Freeze dimensions should anything read an output of the operator at hand."""


class Call:
    """One operator call as a rule sees it: arguments by schema name, layouts of tensors.

    ``name`` is the operator's, without overload (``aten::add``). A rule notes in ``symbols`` which
    number arguments are widths, so that they can be computed again for a pruned model.
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
        self.name = str(func._schema.name)
        self._tensors: list[torch.Tensor] | None = None

    def __getitem__(self, name: str) -> Any:
        """The argument of that name in the operator's schema, or its default."""
        return argument(self.func, self._args, self._kwargs, name)

    def value(self, name: str) -> Value:
        """The recorded value of a tensor argument."""
        return self.notebook.value(self[name])

    def dims(self, name: str) -> Layout:
        """The layout of a tensor argument; empty when it is None."""
        tensor = self[name]
        return self.notebook.value(tensor).dims if isinstance(tensor, torch.Tensor) else ()

    def tensors(self) -> list[torch.Tensor]:
        """Every tensor among the arguments, those in lists included."""
        if self._tensors is None:
            self._tensors = self._find_tensors()
        return self._tensors

    def _find_tensors(self) -> list[torch.Tensor]:
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


def argument(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str) -> Any:
    """The argument of a call that has this name in the operator's schema, or its default."""
    places, defaults = _signature(func)
    place = places.get(name)
    if place is not None and place < len(args):
        return args[place]
    return kwargs.get(name, defaults.get(name))


@cache
def _signature(func: Any) -> tuple[dict[str, int], dict[str, Any]]:
    places, defaults = {}, {}
    for place, entry in enumerate(func._schema.arguments):
        if not entry.kwarg_only:
            places[entry.name] = place
        defaults[entry.name] = entry.default_value
    return places, defaults


def rule(*subjects: str | type[nn.Module]) -> Callable[[Rule], Rule]:
    """Add a rule for operators, by qualified name (``mylib::myop``), or for classes of modules.

    A rule for an operator is given a ``Call``; one for a module a ``WholeCall``, and what the
    module does inside is not looked at.

    Example:
        >>> @rule("mylib::scale_channels")
        ... def scale_channels(call):
        ...     unify(call.dims("x")[1], call.dims("scale")[0])
        ...     return call.dims("x")
    """

    def add(function: Rule) -> Rule:
        for subject in subjects:
            if isinstance(subject, str):
                RULES[subject] = function
            else:
                MODULE_RULES[subject] = function
        return function

    return add


def apply_rule(call: Call) -> list[Value]:
    """The value of every output of ``call``; an operator without a rule freezes what it touches.

    Raises:
        TraceError: a rule gives a layout that does not fit an output.
    """
    if not call.outputs and call.name not in RULES:
        return []
    if not call.tensors():
        reason = None if call.name in FILLED else f"numbers made by {call.name}"
        return [Value(fresh(tensor.shape, reason)) for tensor in call.outputs]
    found = RULES.get(call.name)
    if found is None:
        found = pointwise if torch.Tag.pointwise in call.func.tags else _unknown
    return follow(found, call)


def follow(found: Rule, call: Call) -> list[Value]:
    """The values that a rule gives.

    Raises:
        TraceError: a layout does not fit its output.
    """
    result = found(call)
    layouts = cast("Sequence[Layout]", [result] if _is_layout(result) else result)
    values = []
    made = [tuple(node.size for node in dims) for dims in layouts]
    shapes = [tuple(tensor.shape) for tensor in call.outputs]
    if made != shapes:
        raise TraceError(
            f"the rule of {call.name} gives layouts of sizes {made} for outputs of shapes "
            f"{shapes}; expected one layout per output, one term per dimension, of the same sizes"
        )
    for dims in layouts:
        values.append(Value(dims))
        carry(call, values[-1])
    return values


def _is_layout(result: Layout | Sequence[Layout]) -> bool:
    return isinstance(result, tuple) and all(isinstance(node, Node) for node in result)


FILLED = frozenset({"aten::zeros", "aten::ones", "aten::full", "aten::empty"})
ADDITIONS = frozenset({"aten::add", "aten::add_"})
COPIES = frozenset(
    {"aten::clone", "aten::detach", "aten::alias", "aten::_to_copy", "prune2deploy::dropout"}
)
BOUNDS = frozenset(
    f"aten::{name}{ending}"
    for name in ("relu", "relu6", "hardtanh", "clamp", "clamp_min", "clamp_max")
    for ending in ("", "_")
)
"""Functions that change nothing the second time: what went through one passes the next as it is."""
VIEWS = frozenset({"aten::view", "aten::_unsafe_view", "aten::reshape"})
PARTS = frozenset({"aten::split", "aten::split_with_sizes", "aten::slice", "aten::chunk"})
TURNS = frozenset({"aten::t", "aten::transpose", "aten::permute"})


def carry(call: Call, value: Value) -> None:
    """Remember what reaches a value through additions, and which stored tensor it is a view of."""
    tensors = call.tensors()
    if call.name in ADDITIONS:
        for tensor in tensors if call["alpha"] == 1 else tensors[:1]:
            number = call.notebook.number(tensor)
            value.residual |= call.notebook.value(tensor).residual | {number}
    elif len(tensors) == 1 and call.name in COPIES | PARTS | TURNS:
        source = call.notebook.value(tensors[0])
        value.origin, value.weight = source.origin, source.weight
        if call.name in TURNS and source.origin:
            value.origin = tuple(source.origin[place] for place in turn(call, len(source.dims)))
        if call.name in COPIES:
            value.residual = source.residual | {call.notebook.number(tensors[0])}
    elif len(tensors) == 1 and call.name in VIEWS:  # the same elements in the same order
        value.residual = call.notebook.value(tensors[0]).residual | {
            call.notebook.number(tensors[0])
        }
    elif len(tensors) == 1 and call.name in BOUNDS:
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


@rule(LEAVE)
def leave(call: Call) -> list[Layout]:
    """What is done with the values elsewhere is not seen."""
    return give_up(call, f"its values are handed to {call['how']}")


UNTAGGED = (
    "aten::hardswish", "aten::hardswish_", "aten::relu6_", "aten::gelu_", "aten::mish_",
    "aten::log_sigmoid_forward", "aten::rrelu_with_noise", "aten::rrelu_with_noise_",
    "aten::threshold_", "aten::polar", "aten::complex", "aten::fill",
    "aten::fake_quantize_per_tensor_affine", "aten::view_as", "aten::masked_fill",
)  # fmt: skip
"""Element-wise operators that PyTorch has not tagged as such."""
rule(*UNTAGGED)(pointwise)


@rule("aten::copy_", "aten::fill_", "aten::masked_fill_", "aten::lerp_")
def copy_in(call: Call) -> Layout:
    """Write into a tensor: the source is broadcast to it."""
    return broadcast([call.notebook.value(tensor).dims for tensor in call.tensors()])


@rule(
    "aten::native_dropout", "prune2deploy::dropout", "aten::bernoulli_", "aten::bernoulli",
    "aten::normal_", "aten::uniform_", "aten::zero_", "aten::_to_copy", "aten::clone",
    "aten::detach", "aten::alias", "aten::lift_fresh", "aten::zeros_like", "aten::ones_like",
    "aten::full_like", "aten::empty_like", "aten::randn_like",
    "aten::contiguous", "aten::detach_", "aten::lift_fresh_copy", "aten::exponential_",
    "aten::random_", "aten::_conj", "aten::rand_like", "aten::randint_like",
)  # fmt: skip
def same(call: Call) -> list[Layout]:
    """Outputs have the layout of the first tensor."""
    dims = call.notebook.value(call.tensors()[0]).dims
    return [dims] * len(call.outputs)


@rule("aten::flip", "aten::roll", "aten::cumsum", "aten::cumsum_", "aten::cumprod",
      "aten::logcumsumexp")  # fmt: skip
def ordered(call: Call) -> Layout:
    """Dimensions whose positions trade places or are summed up in order: they stay."""
    x = call.dims("self")
    given = call["dim"] if call["dims"] is None else call["dims"]
    given = [given] if isinstance(given, int) else list(given) or range(len(x))
    freeze([x[place % len(x)] for place in given if x], "its order matters")
    return x


@rule("aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax")
def softmax(call: Call) -> Layout:
    """Positions that share a distribution are categories, each with a meaning: they stay."""
    x = call.dims("self")
    if x:
        freeze([x[call["dim"] % len(x)]], CATEGORIES)
    return x
