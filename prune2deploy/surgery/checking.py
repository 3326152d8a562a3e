"""Whether a pruned module computes what the plan implies.

In: a module whose stored tensors are sliced, the recorded operators, the planned widths. Out: a
verdict, operator by operator: where the tensors come from that it takes, their shapes and those of
what it returns, and its numbers. Those that are widths (groups, where a slice begins) are to be as
planned: an operator may return the planned shape with a number that a constant in the code has left
as it was. All others are to be as recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import (
    as_inputs,
    run,
    stored_tensors,
    tensors_in,
    untouched,
)
from prune2deploy.graph.following import memory_of, written_by
from prune2deploy.graph.layout import VARYING, Layout, Node, leaves
from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.graph.rules import Value
from prune2deploy.graph.shapes import Outline, on_shapes, outlined
from prune2deploy.graph.whole import watched
from prune2deploy.surgery.seeing import (
    ENDS,
    IN_ORDER,
    Calls,
    Seeing,
    Seen,
    Shapes,
    Source,
    ids,
    shapes_of,
)
from prune2deploy.surgery.widths import Widths

Results = tuple[Shapes, tuple[Source, ...]]
"""What a model returns: shapes, and where each tensor comes from."""

Wanted = tuple[Seen, Operation]
"""What is to be seen of a recorded operator."""


class Expected:
    """What is to be seen of a pruned module: the recorded operators with the planned widths.

    Args:
        recording: Of the original.
        widths: Of the plan.
        removed: Names of the blocks that are taken out.
    """

    def __init__(self, recording: Recording, widths: Widths, removed: Sequence[str] = ()) -> None:
        operations = recording.without(removed)
        known = list(itertools.takewhile(_known_size, operations))
        self._recording, self._widths = recording, widths
        self._complete = len(known) == len(operations)
        self._strictly = strictly = _any_written(operations)
        self._wanted, self._results = _planned(known, recording, widths, removed, strictly=strictly)

    def met_by(self, module: nn.Module, example: Any) -> bool:
        """Whether a module runs like that.

        It is run as it was recorded. On shapes without values, a number that is not as it was
        recorded comes from a width, and should not have changed with it. Code that keeps what it
        has computed (anchors, masks) computes it again when widths have changed: where other
        operators are met in a first pass, a second one decides.
        """
        recording, wanted = self._recording, self._wanted
        shapes = recording.on_shapes
        inputs = outlined(example) if shapes else example
        returned: list[Results] = []
        try:
            with untouched(module, shapes=shapes), on_shapes(module, shapes):
                for _ in range(2):
                    calls = Calls(_before(module, recording, inputs), strictly=self._strictly)
                    watch = Seeing(calls)
                    with watched(module, watch.inside, watch.ended), watch:
                        result = run(module, inputs, recording.forward_fn)
                    returned.append((shapes_of(result), calls.of(ids(result))))
                    if _same_operators(calls.listed, wanted, complete=self._complete):
                        return (
                            returned[0][0] == returned[-1][0]
                            and (not self._complete or returned[-1] == self._results)
                            and _same_widths(calls.listed, wanted, self._widths)
                            and (not shapes or _same_others(calls.listed, wanted, recording.values))
                        )
        except Exception:  # noqa: BLE001  the user's code may fail in any way when widths change
            return False
        return False


def _before(module: nn.Module, recording: Recording, inputs: Any) -> dict[int, Source]:
    """What there is before a model runs, by identity: the numbers of stored and given tensors."""
    known: dict[int, Source] = dict(zip(ids(as_inputs(inputs)), recording.inputs, strict=True))
    known |= {id(tensor): recording.stored.get(name) for name, tensor in stored_tensors(module)}
    return known


def _planned(
    operations: Sequence[Operation],
    recording: Recording,
    widths: Widths,
    removed: Sequence[str],
    *,
    strictly: bool,
) -> tuple[list[Wanted], Results]:
    """Each operator that counts, and the results, with the shapes that the plan implies."""
    held = {number: value.dims for number, value in enumerate(recording.values)}
    calls = Calls(
        {n: n for n in (*recording.stored.values(), *recording.inputs)}, strictly=strictly
    )
    ends = ((block.outputs[0], block.inputs[0]) for block in recording.spans(removed).values())
    handed = {after: before for after, before in ends if after != before}
    listed: list[Operation] = []

    def numbers(tree: Any) -> Iterator[int]:
        for ref in refs_in(tree):
            number = ref.number
            while number in handed:  # a block that is taken out hands on what it is given
                number = handed[number]
            yield number

    for one in operations:
        held.update(zip(one.outputs, one.layouts, strict=True))
        given = list(numbers((one.args, one.kwargs)))
        made, taken = (_sizes(widths, held, each) for each in (one.outputs, given))
        call = Seen(one.name, made, taken, one.func, one.args, one.kwargs, calls.of(given))
        if calls.enter(call, one.outputs):
            listed.append(one)
    returned = list(numbers(recording.outputs))
    results = _sizes(widths, held, returned), calls.of(returned)
    return list(zip(calls.listed, listed, strict=True)), results


def _sizes(widths: Widths, held: Mapping[int, Layout], numbers: Iterable[int]) -> Shapes:
    return tuple(widths.shape(held[number]) for number in numbers)


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
        and (found.taken, found.sources) == (one.taken, one.sources)
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
    named = zip(_names(func), args, strict=False)
    sized = func._schema.name in SIZED
    found: list[float] = []
    for name, entry in (*named, *kwargs.items()):
        if name not in told and not (sized and (name in SIZES or isinstance(entry, list | tuple))):
            items = entry if isinstance(entry, list | tuple) else (entry,)
            found += [item for item in items if type(item) in (int, float)]
    return found


@cache
def _names(func: Any) -> tuple[str, ...]:
    """The names of the arguments of an operator."""
    return tuple(one.name for one in func._schema.arguments)


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
        with suppress(Exception), untouched(module, shapes=True), on_shapes(module, True):
            return run(module, outlined(example), recording.forward_fn)
    with untouched(module):
        return run(module, example, recording.forward_fn)
