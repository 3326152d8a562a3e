"""Whether a pruned module computes what the plan implies.

In: a module whose stored tensors are sliced, the recorded operators, the planned widths. Out: a
verdict, operator by operator, on the shapes that are returned and on the numbers that are widths:
groups, where a slice begins. An operator may return the planned shape with a number that a
constant in the code has left as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import run, tensors_in, untouched
from prune2deploy.graph.layout import VARYING, Node, leaves
from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.graph.rules import Value, argument
from prune2deploy.graph.shapes import Outline, on_shapes, outlined
from prune2deploy.graph.visible import Watch
from prune2deploy.graph.whole import name_of, watched
from prune2deploy.surgery.widths import Widths


@dataclass(frozen=True)
class Seen:
    """One operator call of the module under check.

    Attributes:
        name: Of the operator.
        shapes: Those that it returned.
        func: Its ATen overload; None for a module that is an operator by itself.
        args: Its arguments.
        kwargs: Likewise.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    func: Any = None
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] | None = None

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
            self.seen.append(Seen(func._schema.name, _shapes(result), func, args, kwargs))

    def ended(self, module: nn.Module, result: Any) -> None:
        """Hear of a module that is an operator by itself."""
        self.seen.append(Seen(name_of(module), _shapes(result)))


def _shapes(result: Any) -> tuple[tuple[int, ...], ...]:
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
    known = list(itertools.takewhile(_known_size, operations))
    returned: list[list[torch.Size]] = []
    try:
        with untouched(module), on_shapes(module, shapes):
            for _ in range(2):
                watch = _Seeing()
                with watched(module, watch.inside, watch.ended), watch:
                    result = run(module, inputs, recording.forward_fn)
                returned.append([tensor.shape for tensor in tensors_in(result)])
                if _same_operators(watch.seen, operations, known):
                    return (
                        returned[0] == returned[-1]
                        and _same_widths(watch.seen, known, widths)
                        and (not shapes or _same_factors(watch.seen, known, recording.values))
                    )
    except Exception:  # noqa: BLE001  the user's code may fail in any way when widths change
        return False
    return False


def _same_operators(
    seen: Sequence[Seen], operations: Sequence[Operation], known: Sequence[Operation]
) -> bool:
    """Whether the operators are those recorded, as far as values have no say in them."""
    if len(known) == len(operations) != len(seen):
        return False
    pairs = zip(seen, known, strict=False)
    return all(found.name == operation.name for found, operation in pairs)


def _same_widths(seen: Sequence[Seen], known: Sequence[Operation], widths: Widths) -> bool:
    pairs = zip(seen, known, strict=False)
    return all(
        found.shapes == tuple(widths.shape(dims) for dims in operation.layouts)
        and _same_numbers(found, operation, widths)
        for found, operation in pairs
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


def _same_factors(
    seen: Sequence[Seen], known: Sequence[Operation], values: Sequence[Value]
) -> bool:
    """Whether operators compute with the numbers and constants that they were recorded with."""
    constants = {n: v.constant for n, v in enumerate(values) if v.constant is not None}
    return all(
        found.func is None
        or (
            _factors(found.func, found.args, found.kwargs or {})
            == _factors(operation.func, operation.args, operation.kwargs)
            and (not constants or _same_constants(found, operation, constants))
        )
        for found, operation in zip(seen, known, strict=False)
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


def _factors(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[float]:
    """Numbers that an operator computes with, in order; whole ones may be sizes and positions."""
    kinds = (int, float) if torch.Tag.pointwise in func.tags else (float,)
    found: list[float] = []
    for entry in (*args, *kwargs.values()):
        items = entry if isinstance(entry, list | tuple) else (entry,)
        found += [item for item in items if type(item) in kinds]
    return found


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
