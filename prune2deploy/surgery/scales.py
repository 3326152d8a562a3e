"""Fused attention divides by the root of its width: by that of the width that the original had.

Attention that is told no scale computes one from the width of its queries. Where heads lose
channels, the softmax would be flatter or steeper than that of a model in which the same channels
are zero. Parameters that make the queries, or the keys, take the factor between the two scales
where they can (``carrying``): the code of the model then stays as it is. Queries and keys that were
normalised by a mean over their channels are shorter with fewer of these, which counts too. Where
no parameters can take the factor, the scale has to be spelt out, which a captured module can. Code
that computes a number from widths itself is told by its number, which in a captured module is what
it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prune2deploy.graph.layout import Node, find, leaves
from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.surgery.carrying import Carriers
from prune2deploy.surgery.spellings import ATTENTIONS, given
from prune2deploy.surgery.widths import Widths

Measure = Callable[[Node], int]
"""The width of a dimension, under a plan or as it was recorded."""

_NORMS = frozenset(
    f"aten::{name}" for name in ("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
)
_MEANS = frozenset({"aten::mean", "aten::var", "aten::var_mean"})
_MIXING = frozenset(
    f"aten::{name}" for name in ("linear", "addmm", "mm", "bmm", "convolution", "embedding")
)
"""Operators whose results have channels of their own."""


@dataclass(frozen=True, eq=False)
class _Kept:
    """Calls of attention, and what takes a factor to all of them: per parameter the entries."""

    operations: tuple[Operation, ...]
    entries: dict[str, Tensor] | None

    def stays(self, removed: Sequence[str]) -> bool:
        """Whether there is such, and none of it goes with blocks that are taken out."""
        inside = tuple(f"{name}." for name in removed)
        return bool(self.entries) and not any(n.startswith(inside) for n in self.entries or ())


@dataclass(frozen=True)
class _Kind:
    """What the products of queries and keys depend on.

    Attributes:
        width: Of the queries, whose root the products are divided by.
        normalised: Widths over which queries and keys were divided by the root of a mean. What is
            left of them is shorter by the root of their share.
    """

    width: Node
    normalised: tuple[Node, ...] = ()

    def ratio(self, before: Measure, after: Measure) -> float:
        """What the products have to be multiplied by to be what they were."""
        shorter = math.prod(before(node) / after(node) for node in self.normalised)
        return math.sqrt(after(self.width) / before(self.width) * shorter)


class _Softmaxes:
    """The calls of attention without a scale of their own, by what their products depend on."""

    def __init__(self, recording: Recording) -> None:
        self.calls: dict[_Kind, list[Operation]] = {}
        unscaled = _unscaled(recording)
        makers = recording.makers() if unscaled else {}
        for operation in unscaled:
            sides = [given(operation, name).number for name in ("query", "key")]
            width = find(recording.values[sides[0]].dims[-1])
            norms = (_normalised(recording, makers, side, width) for side in sides)
            kind = _Kind(width, tuple(node for node in norms if node is not None))
            self.calls.setdefault(kind, []).append(operation)
        self._carriers = Carriers(recording) if self.calls else None
        self._known: dict[_Kind, tuple[_Kept, ...]] = {}

    def changed(self, before: Measure, after: Measure) -> dict[_Kind, float]:
        """The kinds whose products change, and what they have to be multiplied by."""
        ratios = {kind: kind.ratio(before, after) for kind in self.calls}
        return {kind: ratio for kind, ratio in ratios.items() if not math.isclose(ratio, 1.0)}

    def kept(self, kind: _Kind) -> tuple[_Kept, ...]:
        """The calls of one kind: together where one thing can serve them all, else one by one."""
        if kind not in self._known:
            calls = self.calls[kind]
            together = _Kept(tuple(calls), self._entries(calls))
            alone = (_Kept((one,), self._entries([one])) for one in calls)
            self._known[kind] = tuple(alone) if together.entries is None else (together,)
        return self._known[kind]

    def _entries(self, operations: Sequence[Operation]) -> dict[str, Tensor] | None:
        assert self._carriers is not None
        sides = ([(one, name) for one in operations] for name in ("query", "key"))
        return next(filter(None, map(self._carriers.entries, sides)), None)


_KNOWN: WeakKeyDictionary[Recording, _Softmaxes] = WeakKeyDictionary()


def _softmaxes(recording: Recording) -> _Softmaxes:
    if recording not in _KNOWN:
        _KNOWN[recording] = _Softmaxes(recording)
    return _KNOWN[recording]


def factors(
    recording: Recording, before: Widths, after: Widths, removed: Sequence[str] = ()
) -> dict[str, Tensor]:
    """What parameters are multiplied by so that each softmax stays what it was.

    Args:
        recording: The forward pass.
        before: The widths that the parameters were made for.
        after: The widths that they are about to have.
        removed: Blocks that are taken out.

    Returns:
        Per parameter a factor that broadcasts to the shape that it had in the recording.
    """
    found: dict[str, Tensor] = {}
    softmaxes = _softmaxes(recording)
    for kind, ratio in softmaxes.changed(before, after).items():
        for kept in softmaxes.kept(kind):
            for name, entries in (kept.entries or {}).items() if kept.stays(removed) else ():
                factor = torch.ones(entries.shape, dtype=torch.float64).masked_fill(entries, ratio)
                found[name] = found.get(name, 1.0) * factor
    return found


def spelt(recording: Recording, widths: Widths, removed: Sequence[str] = ()) -> dict[int, float]:
    """The scale of each attention that no parameters keep, by the number of its result."""
    softmaxes, left = _softmaxes(recording), recording.without(removed)
    return {
        _result(operation): ratio * widths(kind.width) ** -0.5
        for kind, ratio in softmaxes.changed(_whole, widths).items()
        for kept in softmaxes.kept(kind)
        if not kept.stays(removed)
        for operation in kept.operations
        if operation in left
    }


def _normalised(
    recording: Recording, makers: Mapping[int, list[Operation]], number: int, width: Node
) -> Node | None:
    """What a value of a width was divided over by the root of a mean since it was made, if it was.

    That is the width, or a larger one that it is a part of.
    """
    stack, seen = [number], {number}
    while stack:
        for maker in makers.get(stack.pop(), []):
            if maker.name in _MIXING:
                continue
            refs = [ref.number for ref in refs_in((maker.args, maker.kwargs))]
            if maker.name in _NORMS or (maker.name in _MEANS and _along_the_last(recording, maker)):
                over = find(recording.values[refs[0]].dims[-1])
                if set(leaves(width)) & set(leaves(over)):
                    return over
            stack += [ref for ref in refs if ref not in seen]
            seen.update(refs)
    return None


def _along_the_last(recording: Recording, operation: Operation) -> bool:
    dims = given(operation, "dim")
    last = len(recording.values[given(operation, "self").number].dims) - 1
    return dims is not None and {dim % (last + 1) for dim in dims} == {last}


def _whole(node: Node) -> int:
    """The width that a dimension had when it was recorded."""
    return find(node).size


def renumbered(
    scales: dict[int, float], one: Recording, other: Recording
) -> dict[int, float] | None:
    """Scales of the calls in one recording by the numbers in another of the same module.

    ``None`` where the other does not have the same calls.
    """
    before, after = (list(map(_result, _unscaled(each))) for each in (one, other))
    if len(before) != len(after):
        return None
    return {new: scales[old] for old, new in zip(before, after, strict=True) if old in scales}


def _unscaled(recording: Recording) -> list[Operation]:
    """The calls of attention that compute their scale from a width."""
    return [
        operation
        for operation in recording.operations
        if operation.name in ATTENTIONS and given(operation, "scale") is None
    ]


def _result(operation: Operation) -> int:
    return operation.outputs[0]


def kept_alike(one: Recording, other: Recording, widths: Widths) -> bool:
    """Whether two recordings show the same parameters to keep the scales of the same calls.

    Args:
        one: A recording.
        other: Another of the same module.
        widths: For the first; where no products change, there is nothing to keep.
    """
    softmaxes = _softmaxes(one)
    return not softmaxes.changed(_whole, widths) or kept_by(one) == kept_by(other)


def kept_by(recording: Recording) -> list[tuple[str, ...]]:
    """The parameters that can keep the scale of each attention, in the order of the calls."""
    softmaxes = _softmaxes(recording)
    names = {
        operation: tuple(kept.entries or ())
        for kind in softmaxes.calls
        for kept in softmaxes.kept(kind)
        for operation in kept.operations
    }
    return [names[operation] for operation in recording.operations if operation in names]
