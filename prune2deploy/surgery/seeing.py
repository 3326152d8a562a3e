"""Operators of a module as they run: what is compared of each.

Operators that hand on the elements of a tensor as they are, in their order, are left out: how many
of them it takes depends on strides, and on which dimensions are one wide. Where something is
written to memory that these share they count, since one of them may have been a copy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from prune2deploy.graph.calling import tensors_in
from prune2deploy.graph.rules import argument
from prune2deploy.graph.visible import Watch
from prune2deploy.graph.whole import name_of

Shapes = tuple[tuple[int, ...], ...]

Source = int | tuple[int, int] | None
"""The number of a value that is stored or given, or which result of which operator; else None."""


@dataclass(frozen=True)
class Seen:
    """One operator call of the module under check.

    Attributes:
        name: Of the operator.
        shapes: Those that it returned.
        taken: Those of the tensors that it was given.
        func: Its ATen overload; None or a stand-in for a module that is an operator by itself.
        args: Its arguments.
        kwargs: Likewise.
        sources: Where each of the tensors that it was given comes from.
    """

    name: str
    shapes: Shapes
    taken: Shapes
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None
    sources: tuple[Source, ...] = ()

    @property
    def idle(self) -> bool:
        """Whether it hands on the elements of a tensor as they are, in their order."""
        return (
            self.name in IN_ORDER
            and self.func._overloadname != "dtype"
            and math.prod(self.taken[0]) == math.prod(self.shapes[0])
        )

    def number(self, name: str) -> Any:
        """The argument of that name; the ends of a slice counted from the front."""
        if self.name not in SLICES or name not in ENDS:
            return self._given(name)
        size = self._given("self").shape[self._given("dim")]
        return slice(*map(self._given, ENDS)).indices(size)[ENDS.index(name)]

    def _given(self, name: str) -> Any:
        return argument(self.func, self.args, self.kwargs or {}, name)


SLICES = frozenset({"aten::slice", "aten::slice_copy"})
ENDS = ("start", "end")
IN_ORDER = SLICES | frozenset(
    f"aten::{name}"
    for name in (
        "clone", "alias", "view", "_unsafe_view", "reshape", "_reshape_alias", "unsqueeze",
        "squeeze", "expand",
    )
)  # fmt: skip
"""Operators that keep the order of elements where they return as many as they are given."""


class Calls:
    """Operators in order, and where values come from: those left out hand on what they take."""

    def __init__(self, known: Mapping[int, Source], *, strictly: bool) -> None:
        self.listed: list[Seen] = []
        self._sources = dict(known)
        self._strictly = strictly

    def enter(self, call: Seen, made: Iterable[int]) -> bool:
        """List an operator, unless it is left out; values by any key that is their own."""
        left_out = call.idle and not self._strictly
        place = len(self.listed)
        for number, key in enumerate(made):
            self._sources[key] = call.sources[0] if left_out else (place, number)
        if not left_out:
            self.listed.append(call)
        return not left_out

    def of(self, keys: Iterable[int]) -> tuple[Source, ...]:
        """Where values come from."""
        return tuple(map(self._sources.get, keys))


class Seeing(Watch):
    """Lists each operator that runs."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls
        self.inside: list[nn.Module] = []  # modules that are operators by themselves
        self._alive: list[Any] = []  # keeps ids unique; torch detaches what somebody holds

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Hear of an operator that has run."""
        if self.inside:
            self._alive.append(result)
        else:
            self._enter(func._schema.name, (args, kwargs), result, func)

    def ended(self, module: nn.Module, given: Any, result: Any) -> None:
        """Hear of a module that is an operator by itself."""
        self._enter(name_of(module), given, result, None)

    def _enter(self, name: str, given: tuple[Any, Any], result: Any, func: Any) -> None:
        self._alive.append(result)
        taken, made = list(tensors_in(given)), list(tensors_in(result))
        args, kwargs = given if func is not None else ((), None)
        sources = self.calls.of(map(id, taken))
        call = Seen(name, shapes_of(made), shapes_of(taken), func, args, kwargs, sources)
        self.calls.enter(call, map(id, made))


def ids(tree: Any) -> list[int]:
    """The identities of nested tensors, in order."""
    return list(map(id, tensors_in(tree)))


def shapes_of(tree: Any) -> Shapes:
    """The shapes of nested tensors, in order."""
    return tuple(tuple(tensor.shape) for tensor in tensors_in(tree))
