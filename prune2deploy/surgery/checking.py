"""Whether a pruned module computes what the plan implies.

In: a module whose stored tensors are sliced, the recorded operators, the planned widths. Out: a
verdict, operator by operator, on the shapes that are taken and returned and on the numbers that are
widths: groups, where a slice begins. An operator may return the planned shape with a number that a
constant in the code has left as it was.

Operators that hand on the elements of a tensor as they are, in their order, are left out: how many
of them it takes depends on strides, and on which dimensions are one wide, and each shape that the
others take is compared. Where something is written to memory that these share they count, since one
of them may have been a copy.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import run, tensors_in, untouched
from prune2deploy.graph.following import memory_of, written_by
from prune2deploy.graph.layout import VARYING, Node, leaves
from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.graph.rules import Value, argument
from prune2deploy.graph.shapes import Outline, on_shapes, outlined
from prune2deploy.graph.visible import Watch
from prune2deploy.graph.whole import name_of, watched
from prune2deploy.surgery.widths import Widths

Shapes = tuple[tuple[int, ...], ...]


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
    """

    name: str
    shapes: Shapes
    taken: Shapes = ()
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

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


class _Seeing(Watch):
    """Lists each operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Seen] = []
        self.inside: list[nn.Module] = []  # modules that are operators by themselves
        self._alive: list[Any] = []  # torch detaches a new tensor that somebody holds

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Hear of an operator that has run."""
        self._alive.append(result)
        if not self.inside:
            taken = _shapes((args, kwargs))
            self.seen.append(Seen(func._schema.name, _shapes(result), taken, func, args, kwargs))

    def ended(self, module: nn.Module, given: Any, result: Any) -> None:
        """Hear of a module that is an operator by itself."""
        self.seen.append(Seen(name_of(module), _shapes(result), _shapes(given)))


def _shapes(result: Any) -> Shapes:
    return tuple(tuple(tensor.shape) for tensor in tensors_in(result))


def runs_as_planned(
    module: nn.Module,
    recording: Recording,
    widths: Widths,
    example: Any,
    removed: Sequence[str] = (),
) -> bool:
    """Whether the module runs the recorded operators, each with the widths that the plan implies.

    It is run as it was recorded. On shapes without values, a number that is not as it was recorded
    comes from a width, and should not have changed with it. Code that keeps what it has computed
    (anchors, masks) computes it again when widths have changed: where other operators are met in
    a first pass, a second one decides.
    """
    operations, shapes = recording.without(removed), recording.on_shapes
    inputs = outlined(example) if shapes else example
    strictly = _any_written(operations)
    known = list(itertools.takewhile(_known_size, operations))
    complete = len(known) == len(operations)
    wanted = [pair for pair in _planned(known, recording, widths) if strictly or not pair[0].idle]
    returned: list[Shapes] = []
    try:
        with untouched(module), on_shapes(module, shapes):
            for _ in range(2):
                watch = _Seeing()
                with watched(module, watch.inside, watch.ended), watch:
                    result = run(module, inputs, recording.forward_fn)
                returned.append(_shapes(result))
                seen = [one for one in watch.seen if strictly or not one.idle]
                if _same_operators(seen, wanted, complete=complete):
                    return (
                        returned[0] == returned[-1]
                        and (not complete or returned[0] == _results(recording, widths))
                        and _same_widths(seen, wanted, widths)
                        and (not shapes or _same_others(seen, wanted, recording.values))
                    )
    except Exception:  # noqa: BLE001  the user's code may fail in any way when widths change
        return False
    return False


Wanted = tuple[Seen, Operation]
"""What is to be seen of a recorded operator."""


def _planned(
    operations: Sequence[Operation], recording: Recording, widths: Widths
) -> Iterator[Wanted]:
    """Each operator with the shapes that the plan implies."""
    held = {number: value.dims for number, value in enumerate(recording.values)}
    for one in operations:
        held.update(zip(one.outputs, one.layouts, strict=True))
        taken = (widths.shape(held[ref.number]) for ref in refs_in((one.args, one.kwargs)))
        made = map(widths.shape, one.layouts)
        yield Seen(one.name, tuple(made), tuple(taken), one.func, one.args, one.kwargs), one


def _results(recording: Recording, widths: Widths) -> Shapes:
    """The shapes of what the model is to return."""
    refs = refs_in(recording.outputs)
    return tuple(widths.shape(recording.values[ref.number].dims) for ref in refs)


def _any_written(operations: Sequence[Operation]) -> bool:
    """Whether there are writes to memory that operators which may be left out read or return."""
    memory = memory_of(operations)
    handed = {
        memory.get(number, number)
        for one in operations
        if one.name in IN_ORDER
        for number in (*one.outputs, *(ref.number for ref in refs_in(one.args)))
    }
    targets = (ref.number for one in operations for ref in refs_in(written_by(one)))
    return any(memory.get(number, number) in handed for number in targets)


def _same_operators(seen: Sequence[Seen], wanted: Sequence[Wanted], *, complete: bool) -> bool:
    """Whether the operators are those recorded, as far as values have no say in them."""
    if complete and len(wanted) != len(seen):
        return False
    return all(found.name == one.name for found, (one, _) in zip(seen, wanted, strict=False))


def _same_widths(seen: Sequence[Seen], wanted: Sequence[Wanted], widths: Widths) -> bool:
    return all(
        found.shapes == one.shapes
        and found.taken == one.taken
        and _same_numbers(found, operation, widths)
        for found, (one, operation) in zip(seen, wanted, strict=False)
    )


def _same_numbers(found: Seen, operation: Operation, widths: Widths) -> bool:
    """Whether the number arguments that are widths have their planned values."""
    if found.func is None:
        return True  # the attributes of such a module were set from the plan
    for name, terms in operation.symbols.items():
        number = found.number(name)
        if any(map(_varies, terms)) or number is None:
            continue
        sizes = widths.shape(terms)
        if (tuple(number) != sizes) if isinstance(number, list | tuple) else number != sum(sizes):
            return False
    return True


def _same_others(seen: Sequence[Seen], wanted: Sequence[Wanted], values: Sequence[Value]) -> bool:
    """Whether operators are given the numbers and constants that they were recorded with."""
    constants = {n: v.constant for n, v in enumerate(values) if v.constant is not None}
    return all(
        found.func is None
        or (
            _others(found.func, found.args, found.kwargs or {}, operation.symbols)
            == _others(operation.func, operation.args, operation.kwargs, operation.symbols)
            and (not constants or _same_constants(found, operation, constants))
        )
        for found, (_, operation) in zip(seen, wanted, strict=False)
    )


def _same_constants(
    found: Seen, operation: Operation, constants: Mapping[int, torch.Tensor]
) -> bool:
    """Whether the tensors that code has made from numbers are those that were recorded.

    What it has made on shapes has no values to compare.
    """
    refs = refs_in((operation.args, operation.kwargs))
    if not any(ref.number in constants for ref in refs):
        return True
    tensors = tensors_in((found.args, found.kwargs))
    return all(
        ref.number not in constants
        or isinstance(tensor, Outline)
        or torch.equal(constants[ref.number], tensor)
        for ref, tensor in zip(refs, tensors, strict=True)
    )


def _others(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], told: Collection[str]
) -> list[float]:
    """Numbers that an operator is given, in order, except those of widths: ``told``, and sizes."""
    named = zip((one.name for one in func._schema.arguments), args, strict=False)
    sized = func._schema.name in SIZED
    found: list[float] = []
    for name, entry in (*named, *kwargs.items()):
        if name not in told and not (sized and (name in SIZES or isinstance(entry, list | tuple))):
            items = entry if isinstance(entry, list | tuple) else (entry,)
            found += [item for item in items if type(item) in (int, float)]
    return found


SIZED = IN_ORDER | frozenset(
    f"aten::{name}"
    for name in (
        "split", "split_with_sizes", "split_with_sizes_copy", "unsafe_split",
        "unsafe_split_with_sizes", "view_copy", "_reshape_copy", "expand_copy", "as_strided_",
        "zeros", "ones", "full", "empty", "empty_strided", "rand", "randn", "new_zeros",
        "new_ones", "new_full", "new_empty", "new_empty_strided",
    )
)  # fmt: skip
"""Operators of which the shapes of the results tell whether they are given the right sizes."""
SIZES = (*ENDS, "split_size")


def _known_size(operation: Operation) -> bool:
    """Whether the values of the input have no say in the sizes that an operator returns."""
    return not any(_varies(node) for dims in operation.layouts for node in dims)


def _varies(node: Node) -> bool:
    return any(below.frozen == VARYING for below in leaves(node))


def check_outputs(module: nn.Module, recording: Recording, widths: Widths, example: Any) -> None:
    """Raise PruneError unless the module runs and returns the shapes that the original returns."""
    try:
        result = _result(module, recording, example)
    except Exception as error:
        raise PruneError(
            f"the pruned model does not run: {type(error).__name__}: {error}. Expected it to run "
            "on the inputs that the original was traced with. Prune fewer axes, or report the "
            "model: its code depends on widths in a way that is not understood."
        ) from error
    found = [tuple(t.shape) for t in tensors_in(result)]
    layouts = [recording.values[ref.number].dims for ref in refs_in(recording.outputs)]
    planned = [widths.shape(dims) for dims in layouts]
    if found != planned and not any(_varies(node) for dims in layouts for node in dims):
        raise PruneError(f"the pruned model returns shapes {found}, expected {planned}")


def _result(module: nn.Module, recording: Recording, example: Any) -> Any:
    """What the module returns, in shapes where the recording shows that these will do."""
    if recording.on_shapes:
        with suppress(Exception), untouched(module), on_shapes(module, True):
            return run(module, outlined(example), recording.forward_fn)
    with untouched(module):
        return run(module, example, recording.forward_fn)
