"""Recording → Graph: name the leaves that cut stored tensors, and write widths as formulas."""

from __future__ import annotations

from collections.abc import Iterable
from functools import reduce
from operator import mul
from typing import Any

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import TraceError
from prune2deploy.graph.axes import Axis, Block, Graph, Layer, Member, Polynomial, packed
from prune2deploy.graph.layout import (
    CAT,
    LEAF,
    PROD,
    Layout,
    Node,
    factors,
    find,
    freeze,
    tie_root,
)
from prune2deploy.graph.recording import Recording
from prune2deploy.graph.rules import KERNEL

Positions = list[tuple[Node, npt.NDArray[np.int64]]]


def build(recording: Recording) -> Graph:
    """Turn what was recorded into the frozen graph.

    Raises:
        TraceError: the model stores no tensor that its forward pass uses.
    """
    names = _Names()
    members = _members(recording, names)
    if not members:
        raise TraceError(
            "the model has no parameter with a dimension above one: there is nothing to prune"
            + packed(recording.unknown)
        )
    ties = _tie_numbers(members)
    _keep_tables(recording, members)
    axes = tuple(
        Axis(names[node], node.size, tuple(found), node.frozen, ties.get(id(tie_root(node))))
        for node, found in members.items()
    )
    formulas = _Formulas(names)
    recording.axis_names.update({id(node): names[node] for node in members})
    return Graph(
        axes=axes,
        layers=tuple(_layer(c, formulas) for c in recording.contractions),
        tensors={
            name: formulas.dims(recording.values[number].dims)
            for name, number in recording.stored.items()
        },
        parameters=_unshared(recording),
        widths=_widths(recording, formulas),
        unknown=dict(recording.unknown),
        blocks=tuple(_blocks(recording)),
        operators=tuple(operation.name for operation in recording.operations),
        recording=recording,
    )


def _keep_tables(recording: Recording, members: dict[Node, list[Member]]) -> None:
    """Freeze what cuts buffers alone: tables of numbers, which hold nothing that was learnt."""
    for node, found in members.items():
        if not any(member.tensor in recording.parameters for member in found):
            freeze([node], "holds no parameter")


def _unshared(recording: Recording) -> frozenset[str]:
    """Parameter names, each shared tensor once."""
    first: dict[int, str] = {}
    for name, number in recording.stored.items():
        if name in recording.parameters:
            first.setdefault(number, name)
    return frozenset(first.values())


class _Names:
    """Readable unique names for leaves, taken from where their channels are made."""

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._used: dict[str, int] = {}

    def __getitem__(self, node: Node) -> str:
        return self._names[id(node)]

    def __contains__(self, node: Node) -> bool:
        return id(node) in self._names

    def give(self, node: Node, tensor: str, dim: int) -> None:
        if id(node) in self._names:
            return
        base = tensor.rpartition(".")[0] if tensor.endswith((".weight", ".bias")) else tensor
        base = base or tensor
        number = self._used.get(base, 0)
        self._used[base] = number + 1
        self._names[id(node)] = f"{base}:{number}" if number else base


def _members(recording: Recording, names: _Names) -> dict[Node, list[Member]]:
    """Every leaf that cuts a stored tensor, with the members that it has there.

    Leaves are named by the dimension that makes them (a weight's output side) where there is one.
    """
    found: dict[Node, list[tuple[str, int, str, Any]]] = {}
    for name, number in recording.stored.items():
        for dim, node in enumerate(recording.values[number].dims):
            role = recording.roles.get((name, dim), "param")
            for below, channel in positions(node):
                if below.size > 1 and below.frozen != KERNEL:
                    found.setdefault(below, []).append((name, dim, role, channel))
    for wanted in ("out", "in", "param"):
        for node, places in found.items():
            for name, dim, role, _ in places:
                if role == wanted:
                    names.give(node, name, dim)
                    break
    return {node: [Member(*place) for place in places] for node, places in found.items()}


def positions(node: Node) -> Positions:
    """For each leaf of a dimension, which of its channels every position belongs to (-1: none)."""
    node = find(node)
    if node.kind == LEAF:
        return [(node, np.arange(node.size))]
    found: Positions = []
    if node.kind == CAT:
        at = 0
        for part in node.parts:
            for below, channel in positions(part):
                whole = np.full(node.size, -1)
                whole[at : at + len(channel)] = channel
                found.append((below, whole))
            at += find(part).size
        return found
    outer = 1
    for part in node.parts:
        size = find(part).size
        inner = node.size // (outer * size)
        for below, channel in positions(part):
            found.append((below, np.tile(np.repeat(channel, inner), outer)))
        outer *= size
    return found


def _tie_numbers(nodes: Iterable[Node]) -> dict[int, int]:
    """A number for every set of at least two leaves that are tied to each other."""
    sets: dict[int, list[Node]] = {}
    for node in nodes:
        sets.setdefault(id(tie_root(node)), []).append(node)
    tied = [root for root, group in sets.items() if len(group) > 1]
    return {root: number for number, root in enumerate(tied)}


class _Formulas:
    """Dimensions as polynomials of axis sizes, each term evaluated once."""

    def __init__(self, names: _Names) -> None:
        self._names = names
        self._known: dict[int, Polynomial] = {}

    def __call__(self, node: Node) -> Polynomial:
        node = find(node)
        known = self._known.get(id(node))
        if known is None:
            known = self._known[id(node)] = self._formula(node)
        return known

    def _formula(self, node: Node) -> Polynomial:
        if node.kind == LEAF:
            if node in self._names:
                return Polynomial(((1, (self._names[node],)),))
            return Polynomial.constant(node.size)
        parts = [self(part) for part in node.parts]
        if node.kind == CAT:
            return sum(parts[1:], parts[0])
        return reduce(mul, parts)

    def dims(self, dims: Layout) -> tuple[Polynomial, ...]:
        return tuple(self(node) for node in dims)

    def product(self, dims: Layout) -> Polynomial:
        return reduce(mul, self.dims(dims), Polynomial.constant(1))


def _layer(contraction: Any, formulas: _Formulas) -> Layer:
    return Layer(
        contraction.name,
        contraction.kind,
        contraction.weight,
        formulas.product(contraction.in_width),
        formulas.product(contraction.out_width),
        formulas.product(contraction.macs),
    )


def _widths(recording: Recording, formulas: _Formulas) -> tuple[Polynomial, ...]:
    found = {
        formulas(node): None
        for value in recording.values
        for node in value.dims
        if find(node).size > 1
    }
    return tuple(formula for formula in found if formula.axes)


def _blocks(recording: Recording) -> Iterable[Block]:
    """Modules whose input reaches their output through additions alone, with equal layouts.

    Nothing that they make inside is read elsewhere.
    """
    stored = list(recording.stored)
    once: dict[str, int] = {}
    for call in recording.calls:
        once[call.name] = once.get(call.name, 0) + 1
    for call in recording.closed():
        if not (call.leads and call.name and once[call.name] == 1):
            continue
        before, after = (recording.values[n[0]] for n in (call.inputs, call.outputs))
        same = _term_by_term(before.dims) == _term_by_term(after.dims)
        if same and call.inputs[0] in after.residual:
            weights = tuple(name for name in stored if name.startswith(call.name + "."))
            if weights:
                yield Block(call.name, weights)


def _term_by_term(dims: Layout) -> list[Any]:
    """The terms of a layout by what they are made of; all dimensions of size one are alike."""
    return [_form(node) for node in dims]


def _form(node: Node) -> Any:
    """The same for terms that are the same leaf, or the same product or concatenation of such."""
    node = find(node)
    if node.size == 1:
        return None
    if node.kind == LEAF:
        return id(node)
    parts = factors(node) if node.kind == PROD else node.parts
    return (node.kind, *(_form(part) for part in parts))
