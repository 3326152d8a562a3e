"""Which recorded operators read values that follow those of the inputs.

In: operators in the order in which they ran. Out: those that tell the code something else than a
tensor. What depends on no more than shapes does not follow; what is written into a tensor reaches
every view of its memory.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from prune2deploy.graph.recording import Operation, refs_in

SHAPED = frozenset(
    f"aten::{name}"
    for name in (
        "zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like",
        "randint_like", "new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided",
    )
)  # fmt: skip
"""Operators that ask a tensor for its shape, type and device only."""


def followers(operations: Iterable[Operation], inputs: Iterable[int]) -> list[Operation]:
    """Operators that return no tensor and read what was computed from the inputs.

    Args:
        operations: In order.
        inputs: Numbers of the values that are given.
    """
    memory: dict[int, int] = {}  # value → the one whose memory it lies in
    following, found = set(inputs), []
    for op in operations:
        given = [ref.number for ref in refs_in((op.args, op.kwargs))]
        read = [memory.get(number, number) for number in given]
        if read and _aliases(op.func):
            memory.update((number, read[0]) for number in op.outputs if number not in given)
        if op.name in SHAPED or following.isdisjoint(read):
            continue
        written = [ref.number for ref in refs_in(_written(op))]
        following.update(memory.get(number, number) for number in (*written, *op.outputs))
        if not op.outputs and not written:
            found.append(op)
    return found


def _aliases(func: Any) -> bool:
    """Whether what an operator returns lies in the memory of its first argument."""
    schema = getattr(func, "_schema", None)
    return schema is not None and any(returned.alias_info for returned in schema.returns)


def _written(operation: Operation) -> list[Any]:
    """The arguments that an operator writes to."""
    schema = getattr(operation.func, "_schema", None)
    arguments = () if schema is None else schema.arguments
    return [
        operation.args[place] if place < len(operation.args) else operation.kwargs.get(one.name)
        for place, one in enumerate(arguments)
        if one.alias_info is not None and one.alias_info.is_write
    ]
