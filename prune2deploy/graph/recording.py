"""What one forward pass showed, as values: operators, module calls, results.

Filled by ``record``, read by ``build`` (for axes), ``slicing`` (to check a pruned copy against)
and ``capture`` (to write the operators down as a module).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from prune2deploy.graph import layout as algebra
from prune2deploy.graph.calling import Forward
from prune2deploy.graph.layout import Layout
from prune2deploy.graph.rules import Value

INPUT = "model input"
"""Reason of dimensions of what a model is given."""


@dataclass(frozen=True)
class Ref:
    """Stands for a recorded value where an operator's arguments held a tensor."""

    number: int


def refs_in(tree: Any) -> list[Ref]:
    """The value references of nested arguments or results, in order."""
    if isinstance(tree, Ref):
        return [tree]
    if isinstance(tree, Mapping):
        tree = list(tree.values())
    if not isinstance(tree, list | tuple):
        return []
    return [ref for item in tree if not isinstance(item, _PLAIN) for ref in refs_in(item)]


_PLAIN = (int, float, str, type(None))
"""Most of what holds no value; told at once, since every operator is given some."""


class Struct(dict[Any, Any]):
    """Stands for a result of a class of its own: what it holds, by name or place."""

    def __init__(self, items: Any, *, kind: type) -> None:
        super().__init__(items)
        self.kind = kind


@dataclass(frozen=True, eq=False)
class Operation:
    """One recorded operator call.

    Attributes:
        func: The ATen overload, or a ``WholeModule``.
        name: Its name without overload.
        args: Its arguments, tensors replaced by ``Ref``.
        kwargs: Likewise.
        outputs: Value numbers of the tensors that it returned, in order.
        layouts: The layout of each at this point.
        scope: Module path that was running.
        symbols: Number arguments that are widths: one term, or one per entry of a list.
    """

    func: Any
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[int, ...]
    layouts: tuple[Layout, ...]
    scope: str
    symbols: Mapping[str, Layout]


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module.

    Attributes:
        name: Its path.
        module: The module.
        inputs: Value numbers of the tensors among its arguments, in order.
        outputs: Likewise of its result.
        first: Its first operator.
        last: The first operator after it.
        plain: Whether it takes one positional argument and returns one tensor.
        leads: Whether its first argument is a tensor and it returns one tensor.
        hooked: Whether hooks of its own may change what it takes or returns, so that the inputs
            are what they left, the outputs what they were given; or whether it was lent other
            tensors than its own (``torch.func.functional_call``).
    """

    name: str
    module: nn.Module
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    first: int
    last: int
    plain: bool
    leads: bool
    hooked: bool


@dataclass(eq=False)
class Recording:
    """Everything that one forward pass showed.

    Attributes:
        values: Recorded tensors by number.
        operations: Operator calls in order.
        calls: Module calls in the order in which they ended.
        inputs: Value numbers of the example inputs (tensors only, in tree order).
        missed: Names of the parameters that were not used, where values of the input decide what
            is; none where they have no say.
        carried: Value number of every tensor that came in as an attribute of an object and was
            used, and the object's class.
        outputs: The model's result with tensors replaced by ``Ref``.
        stored: Value number of every parameter and buffer name (tied names share one).
        attributes: Value number of every tensor that stood in a plain attribute after the pass.
        numbers: By path of a module and name of an attribute, the whole numbers that it holds: one,
            or a list or tuple of them.
        unknown: Operators without a rule and how often each was met.
        ties: Pairs of dimensions that must keep equally many channels.
        contractions: Per contracting operator: name, kind, weight, and its layouts.
        axis_names: Identity of a leaf to the name of its axis, once the graph is built.
        example: The example inputs and the function that called the model, to run it again.
        on_shapes: Whether the pass ran on shapes, without values.
        roles: Per stored tensor and dimension: ``out`` where a contraction makes channels there,
            ``in`` where it consumes them.
    """

    values: list[Value] = field(default_factory=list)
    operations: list[Operation] = field(default_factory=list)
    calls: list[ModuleCall] = field(default_factory=list)
    inputs: tuple[int, ...] = ()
    missed: tuple[str, ...] = ()
    carried: dict[int, str] = field(default_factory=dict)
    outputs: Any = None
    stored: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    numbers: dict[str, dict[str, Any]] = field(default_factory=dict)
    parameters: frozenset[str] = frozenset()
    unknown: dict[str, int] = field(default_factory=dict)
    ties: list[tuple[algebra.Node, algebra.Node]] = field(default_factory=list)
    contractions: list[Contraction] = field(default_factory=list)
    roles: dict[tuple[str, int], str] = field(default_factory=dict)
    axis_names: dict[int, str] = field(default_factory=dict)
    example: Any = None
    forward_fn: Forward | None = None
    on_shapes: bool = False

    def reads(self) -> Counter[int]:
        """How often operators and the model's result read each value."""
        trees = [(op.args, op.kwargs) for op in self.operations]
        return Counter(ref.number for tree in (*trees, self.outputs) for ref in refs_in(tree))

    def closed(self) -> list[ModuleCall]:
        """The module calls of which nothing but the result is read by what comes after them."""
        last = {
            ref.number: place
            for place, op in enumerate(self.operations)
            for ref in refs_in((op.args, op.kwargs))
        }
        last.update((ref.number, len(self.operations)) for ref in refs_in(self.outputs))
        return [
            call
            for call in self.calls
            if all(
                number in call.outputs or last.get(number, -1) < call.last
                for operation in self.operations[call.first : call.last]
                for number in operation.outputs
            )
        ]

    def makers(self) -> dict[int, list[Operation]]:
        """The operators that give each value, or write to it, in order."""
        found: dict[int, list[Operation]] = {}
        for operation in self.operations:
            for number in operation.outputs:
                found.setdefault(number, []).append(operation)
        return found

    def mark(self) -> tuple[int, ...]:
        """Where the lists of the program end now, for ``rewind``."""
        return (len(self.operations), len(self.calls), len(self.contractions))

    def rewind(self, mark: tuple[int, ...], inputs: tuple[int, ...]) -> None:
        """Forget operators, calls and contractions recorded since; what they coupled stays."""
        for entries, end in zip(
            (self.operations, self.calls, self.contractions), mark, strict=True
        ):
            del entries[end:]  # type: ignore[attr-defined]  # three lists of different items
        self.inputs = inputs

    def spans(self, removed: Sequence[str]) -> dict[int, ModuleCall]:
        """The call of each named block by its first operator."""
        return {call.first: call for call in self.calls if call.name in removed}

    def without(self, removed: Sequence[str]) -> list[Operation]:
        """The operators that remain when the named blocks are taken out."""
        gone = {i for call in self.spans(removed).values() for i in range(call.first, call.last)}
        return [op for place, op in enumerate(self.operations) if place not in gone]


@dataclass(frozen=True, eq=False)
class Contraction:
    """A convolution, linear layer or matrix product: ``macs`` multiplies the layouts given."""

    name: str
    kind: str
    weight: str | None
    in_width: Layout
    out_width: Layout
    macs: Layout
