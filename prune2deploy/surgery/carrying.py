"""Which stored numbers carry a factor into arguments of operators, and into nothing else.

In: a recording, and arguments of its operators. Out: the entries of stored parameters whose
multiplication by a number multiplies these arguments by it and leaves every other value as it was,
or ``None`` where that cannot be shown.

Readers of a value want its entries as they are, or multiplied. What they want of an operator's
result is wanted of what it is made from wherever a factor passes, last operator first (``flows``);
other operators want their arguments as they are. What is wanted multiplied has to come from
parameters alone, and no entry of these may be wanted both ways.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable

import torch
from torch import Tensor

from prune2deploy.graph.recording import Operation, Recording, refs_in
from prune2deploy.graph.whole import WholeModule
from prune2deploy.surgery.flows import AS_IT_IS, FLOWS, MULTIPLIED, Flow, Wanted, anywhere
from prune2deploy.surgery.spellings import given

Place = tuple[Operation, str]
"""An operator and the name of one of its arguments."""


class Carriers:
    """Answers for one recording."""

    def __init__(self, recording: Recording) -> None:
        self._operations = recording.operations
        self._shapes = [tuple(node.size for node in value.dims) for value in recording.values]
        self._returned = {ref.number for ref in refs_in(recording.outputs)}
        self._names: dict[int, list[str]] = defaultdict(list)
        for name, number in recording.stored.items():
            self._names[number].append(name)
        made = Counter(number for operation in self._operations for number in operation.outputs)
        made.update(self._names.keys() | set(recording.inputs))
        self._changed = {number for number, times in made.items() if times > 1}
        self._able = self._parameters(recording) - self._changed
        self._plain = set(self._able)
        self._readers: dict[int, list[int]] = defaultdict(list)
        self._maker: dict[int, int] = {}
        self._sides: dict[int, tuple[str, ...]] = {}
        for at, operation in enumerate(self._operations):
            self._enter(at, operation)

    def _parameters(self, recording: Recording) -> set[int]:
        """Parameters that operators alone read, and no module that is an operator by itself."""
        kinds = [operation.func for operation in self._operations]
        within = tuple(f"{kind.path}." for kind in kinds if isinstance(kind, WholeModule))
        return {
            number
            for number, names in self._names.items()
            if names[0] in recording.parameters
            and not any(name.startswith(within) for name in names)
        }

    def _enter(self, at: int, operation: Operation) -> None:
        """Note who reads what, and which arguments take a factor to the results."""
        for number in {ref.number for ref in refs_in((operation.args, operation.kwargs))}:
            self._readers[number].append(at)
        self._maker.update(dict.fromkeys(operation.outputs, at))
        flow = FLOWS.get(operation.name)
        sides = None if flow is None else self._chosen(operation, flow)
        if flow is None or sides is None:
            return
        self._sides[at] = sides
        made = set(flow.results(operation)) - self._changed
        self._able |= made
        if flow.moves and self._sources(at) <= self._plain:
            self._plain |= made

    def _chosen(self, operation: Operation, flow: Flow) -> tuple[str, ...] | None:
        """One argument of each group, rather one that is a parameter, unless there is none."""
        if any(given(operation, name) for name in flow.unless):
            return None
        chosen = [name for name in flow.where_given if given(operation, name) is not None]
        if not all(self._among(operation, name, self._able) for name in chosen):
            return None
        for group in flow.groups:
            able = [name for name in group if self._among(operation, name, self._able)]
            plain = [name for name in able if self._among(operation, name, self._plain)]
            if not able:
                return None
            chosen.append((plain or able)[0])
        return tuple(chosen)

    def _among(self, operation: Operation, name: str, numbers: Collection[int]) -> bool:
        refs = refs_in(given(operation, name))
        return bool(refs) and all(ref.number in numbers for ref in refs)

    def _sources(self, at: int) -> set[int]:
        sides = self._sides.get(at, ())
        return {ref.number for side in sides for ref in refs_in(given(self._operations[at], side))}

    def entries(self, targets: Collection[Place]) -> dict[str, Tensor] | None:
        """What to multiply: per stored parameter, a bool tensor that broadcasts to its shape."""
        wanted: dict[int, Wanted] = {}
        found: dict[str, Tensor] = {}
        for number in self._before(targets):
            want = wanted[number] = self._wanted(number, targets, wanted)
            if not _some(want[MULTIPLIED]):
                continue
            if number not in self._able:
                return None
            if number in self._names:
                if _some(want[AS_IT_IS] & want[MULTIPLIED]):
                    return None
                found |= dict.fromkeys(self._names[number], _compact(want[MULTIPLIED]))
        return found or None

    def _before(self, targets: Collection[Place]) -> list[int]:
        """The values that a factor may come through, those that are made last first."""
        stack = [ref.number for one, name in targets for ref in refs_in(given(one, name))]
        seen = set(stack)
        while stack:
            fresh = self._sources(self._maker.get(stack.pop(), -1)) - seen
            stack += fresh
            seen |= fresh
        return sorted(seen, key=lambda number: self._maker.get(number, -1), reverse=True)

    def _wanted(self, number: int, targets: Collection[Place], wanted: dict[int, Wanted]) -> Wanted:
        """What all readers of a value want of it."""
        want = torch.zeros(2, *self._shapes[number], dtype=torch.bool)
        want[AS_IT_IS] = number in self._returned
        for at in self._readers[number]:
            operation = self._operations[at]
            for name in _places(operation, number):
                if (operation, name) in targets:
                    want[MULTIPLIED] = True
                elif name in self._sides.get(at, ()):
                    for part in self._passed(at, name, number, targets, wanted):
                        want |= part
                else:
                    want[AS_IT_IS] = True
        return want

    def _passed(
        self,
        at: int,
        name: str,
        number: int,
        targets: Collection[Place],
        wanted: dict[int, Wanted],
    ) -> Iterable[Wanted]:
        """What readers of an operator's results want of an argument, each time it holds a value."""
        operation = self._operations[at]
        flow = FLOWS[operation.name]
        for result in flow.results(operation):
            if result not in wanted:  # it has no part in a target
                wanted[result] = (
                    self._wanted(result, targets, wanted)
                    if flow.moves and result not in self._changed
                    else _as_it_is(self._shapes[result])
                )
        refs = refs_in(given(operation, name))
        results = [wanted[result] for result in flow.results(operation)]
        parts = flow.back(operation, name, results, [self._shapes[ref.number] for ref in refs])
        return [part for part, ref in zip(parts, refs, strict=True) if ref.number == number]


def _places(operation: Operation, number: int) -> list[str]:
    """The names of the arguments that hold a value; those of a module have none."""
    if isinstance(operation.func, WholeModule):
        return [""]
    names = [argument.name for argument in operation.func._schema.arguments]
    return [
        name
        for name in names
        if any(ref.number == number for ref in refs_in(given(operation, name)))
    ]


def _some(mask: Tensor) -> bool:
    return bool(anywhere(mask.flatten(), 0))


def _as_it_is(shape: tuple[int, ...]) -> Wanted:
    want = torch.zeros(2, *shape, dtype=torch.bool)
    want[AS_IT_IS] = True
    return want


def _compact(mask: Tensor) -> Tensor:
    """The same entries with one position along each dimension in which they are alike."""
    for dim in range(mask.dim()):
        first = mask.narrow(dim, 0, 1)
        if torch.equal(first.expand_as(mask), mask):
            mask = first
    return mask.clone()
