"""Fused attention divides by the root of its width: by that of the width that the original had.

Attention that is told no scale computes one from the width of its queries. Where heads lose
channels, the softmax would be flatter or steeper than that of a model in which the same channels
are zero. Parameters that make the queries, or the keys, take the factor between the two scales
where they can (``carrying``): the code of the model then stays as it is. Where they cannot, the
scale has to be spelt out, which a captured module can. Code that computes a number from widths
itself is told by its number, which in a captured module is what it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from prune2deploy.graph.layout import Node, find
from prune2deploy.graph.recording import Operation, Recording
from prune2deploy.surgery.carrying import Carriers
from prune2deploy.surgery.spellings import ATTENTIONS, given
from prune2deploy.surgery.widths import Widths


@dataclass(frozen=True, eq=False)
class _Kept:
    """Calls of attention, and what takes a factor to all of them: per parameter the entries."""

    operations: tuple[Operation, ...]
    entries: dict[str, Tensor] | None

    def stays(self, removed: Sequence[str]) -> bool:
        """Whether there is such, and none of it goes with blocks that are taken out."""
        inside = tuple(f"{name}." for name in removed)
        return bool(self.entries) and not any(n.startswith(inside) for n in self.entries or ())


class _Softmaxes:
    """The calls of attention without a scale of their own, by the width of their queries."""

    def __init__(self, recording: Recording) -> None:
        self.calls: dict[Node, list[Operation]] = {}
        for operation in _unscaled(recording):
            width = recording.values[given(operation, "query").number].dims[-1]
            self.calls.setdefault(find(width), []).append(operation)
        self._carriers = Carriers(recording) if self.calls else None
        self._known: dict[Node, tuple[_Kept, ...]] = {}

    def changed(self, before: Widths, after: Widths) -> list[Node]:
        """The widths that change."""
        return [width for width in self.calls if before(width) != after(width)]

    def kept(self, width: Node) -> tuple[_Kept, ...]:
        """The calls of one width: together where one thing can serve them all, else one by one."""
        if width not in self._known:
            calls = self.calls[width]
            together = _Kept(tuple(calls), self._entries(calls))
            alone = (_Kept((one,), self._entries([one])) for one in calls)
            self._known[width] = tuple(alone) if together.entries is None else (together,)
        return self._known[width]

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
    for width in softmaxes.changed(before, after):
        ratio = math.sqrt(after(width) / before(width))
        for kept in softmaxes.kept(width):
            for name, entries in (kept.entries or {}).items() if kept.stays(removed) else ():
                factor = torch.ones(entries.shape, dtype=torch.float64).masked_fill(entries, ratio)
                found[name] = found.get(name, 1.0) * factor
    return found


def spelt(recording: Recording, widths: Widths, removed: Sequence[str] = ()) -> dict[int, float]:
    """The scale of each attention that no parameters keep, by the number of its result."""
    softmaxes, left = _softmaxes(recording), recording.without(removed)
    return {
        _result(operation): width.size**-0.5
        for width in softmaxes.calls
        if widths(width) != width.size
        for kept in softmaxes.kept(width)
        if not kept.stays(removed)
        for operation in kept.operations
        if operation in left
    }


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
        widths: For the first; where no attention changes its width, there is nothing to keep.
    """
    softmaxes = _softmaxes(one)
    if all(widths(width) == width.size for width in softmaxes.calls):
        return True
    return kept_by(one) == kept_by(other)


def kept_by(recording: Recording) -> list[tuple[str, ...]]:
    """The parameters that can keep the scale of each attention, in the order of the calls."""
    softmaxes = _softmaxes(recording)
    names = {
        operation: tuple(kept.entries or ())
        for width in softmaxes.calls
        for kept in softmaxes.kept(width)
        for operation in kept.operations
    }
    return [names[operation] for operation in recording.operations if operation in names]
