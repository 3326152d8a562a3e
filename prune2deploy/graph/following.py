"""Which recorded values follow those of the inputs, and where the code is told of them.

In: operators in the order in which they ran. Out: values, and the operators that tell the code
something else than a tensor, by which it may decide what to do. What depends on no more than
shapes does not follow; what is written into a tensor reaches every view of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

from prune2deploy.graph.layout import VARYING, find
from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.graph.shapes import written_places

SHAPED = frozenset(
    f"aten::{name}"
    for name in (
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
        "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
    )
)  # fmt: skip
"""Operators that ask a tensor for its shape, type and device only."""


class Followers(NamedTuple):
    """What follows the inputs.

    Attributes:
        values: Numbers of values.
        questions: Operators that read some of them and return no tensor.
    """

    values: set[int]
    questions: list[Operation]


def followers(operations: Iterable[Operation], inputs: Iterable[int]) -> Followers:
    """What is computed from the inputs, and where the code is told of it.

    Args:
        operations: In order.
        inputs: Numbers of the values that are given.
    """
    operations = list(operations)
    memory = memory_of(operations)
    found = Followers(set(inputs), [])
    for op in operations:
        read = [memory.get(ref.number, ref.number) for ref in refs_in((op.args, op.kwargs))]
        if op.name in SHAPED or found.values.isdisjoint(read):
            continue
        written = [ref.number for ref in refs_in(written_by(op))]
        found.values.update(memory.get(number, number) for number in (*written, *op.outputs))
        if not op.outputs and not written:
            found.questions.append(op)
    return found


def memory_of(operations: Iterable[Operation]) -> dict[int, int]:
    """By number of a value that lies in the memory of another, the number of that one."""
    memory: dict[int, int] = {}
    for op in operations:
        given = [ref.number for ref in refs_in((op.args, op.kwargs))]
        if given and _aliases(op.func):
            root = memory.get(given[0], given[0])
            memory.update((number, root) for number in op.outputs if number not in given)
    return memory


def decided_by_numbers(recording: Recording) -> list[Operation]:
    """Questions about floating-point values, or what is computed from them, that follow the input.

    Masks and sizes that are given as whole numbers, and checks of these, are none. How many
    positions are found by such values is known to the code, and counts as a question.
    """
    if recording.on_shapes:
        return []
    operations, kinds = recording.operations, recording.values
    values = followers(operations, recording.inputs).values
    numbers = [n for n in values if (kind := kinds[n].dtype) and kind.is_floating_point]
    found = followers(operations, numbers)
    sized = [op for op in operations if _varies(op) and not found.values.isdisjoint(op.outputs)]
    return found.questions + sized


def _varies(operation: Operation) -> bool:
    """Whether values decide the size of what an operator returns."""
    return any(find(node).frozen == VARYING for dims in operation.layouts for node in dims)


@cache
def _aliases(func: Any) -> bool:
    """Whether what an operator returns lies in the memory of its first argument."""
    schema = getattr(func, "_schema", None)
    return schema is not None and any(returned.alias_info for returned in schema.returns)


def written_by(operation: Operation) -> list[Any]:
    """The arguments that an operator writes to."""
    args, func = operation.args, operation.func
    return [
        args[place]
        if place < len(args)
        else operation.kwargs.get(func._schema.arguments[place].name)
        for place in written_places(func)
    ]
