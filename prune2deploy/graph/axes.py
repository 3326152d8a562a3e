"""The frozen result of tracing: axes, members, layers and their widths as formulas.

In: nothing but plain values. Out: what planning, pruning and reporting read. No torch here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

Counts = Mapping[str, int]
"""Kept channels per axis name; an axis that is absent keeps its full size."""


@dataclass(frozen=True)
class Polynomial:
    """A width, parameter count or MAC count as a sum of products of axis widths.

    Attributes:
        terms: ``((coefficient, (axis, axis, ...)), ...)``; a constant has no axes.
    """

    terms: tuple[tuple[int, tuple[str, ...]], ...]

    def __call__(self, sizes: Counts) -> int:
        """Evaluate with one size per axis name (every axis of the terms must be there)."""
        return sum(c * math.prod(sizes[a] for a in axes) for c, axes in self.terms)

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes that the value depends on."""
        return frozenset(a for _, axes in self.terms for a in axes)

    @staticmethod
    def constant(value: int) -> Polynomial:
        """A polynomial without axes."""
        return Polynomial(((value, ()),) if value else ())

    def __add__(self, other: Polynomial) -> Polynomial:
        return _collect([*self.terms, *other.terms])

    def __mul__(self, other: Polynomial) -> Polynomial:
        return _collect(
            [(c * d, tuple(sorted((*a, *b)))) for c, a in self.terms for d, b in other.terms]
        )


def _collect(terms: list[tuple[int, tuple[str, ...]]]) -> Polynomial:
    sums: dict[tuple[str, ...], int] = {}
    for coefficient, axes in terms:
        sums[axes] = sums.get(axes, 0) + coefficient
    return Polynomial(tuple((c, a) for a, c in sums.items() if c))


def packed(operators: Iterable[str]) -> str:
    """What to do where quantised layers, which hold their weights packed, leave nothing to prune.

    >>> packed(["aten::relu"])
    ''
    """
    found = sorted({name for name in operators if name.startswith("quantized::")})
    if not found:
        return ""
    return (
        f"; it is quantised already ({', '.join(found)}), and such layers hold their weights "
        "packed: prune the model in floating point, and quantise what comes back"
    )


@dataclass(frozen=True, eq=False)
class Member:
    """One dimension of one stored tensor that an axis cuts.

    Attributes:
        tensor: Name in ``state_dict`` (``layer1.0.conv1.weight``).
        dim: The dimension of that tensor.
        role: ``"out"`` where the channels are made (rows of a weight), ``"in"`` where they are
            consumed, ``"param"`` for per-channel parameters and buffers.
        channel: int array, one entry per position of the dimension: the channel of the axis that
            the position belongs to, or -1 where it belongs to none.
    """

    tensor: str
    dim: int
    role: str
    channel: npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Axis:
    """A set of coupled channels that live and die together across tensors.

    Attributes:
        name: Unique and readable, taken from the first layer that makes the channels.
        size: Channels before pruning.
        members: Every stored dimension that it cuts.
        frozen: Why it must keep all its channels, or ``None`` when it may be pruned.
        tie: Axes with the same tie number must keep equally many channels; ``None`` when free.
    """

    name: str
    size: int
    members: tuple[Member, ...]
    frozen: str | None = None
    tie: int | None = None


@dataclass(frozen=True)
class Layer:
    """One call of an operator that contracts channels (convolution, linear, matmul, attention).

    Attributes:
        name: Module path, or operator and number when it is functional.
        operator: ``"convolution"``, ``"linear"`` or ``"matmul"``.
        weight: Name of its weight in ``state_dict``, or ``None``.
        in_width: Channels contracted (all groups together).
        out_width: Channels made.
        macs: Multiply-accumulates for the example input, whole batch.
    """

    name: str
    operator: str
    weight: str | None
    in_width: Polynomial
    out_width: Polynomial
    macs: Polynomial


@dataclass(frozen=True)
class Block:
    """A unit that can be removed whole: its output has the layouts of its input.

    Attributes:
        name: Module path.
        weights: Names of the stored tensors that go with it.
    """

    name: str
    weights: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Graph:
    """What a model is made of, as far as channels are concerned.

    Attributes:
        axes: Every axis that cuts at least one stored tensor, prunable or frozen.
        layers: Contractions in execution order.
        tensors: Shape of every parameter and buffer as one formula per dimension.
        parameters: Names in ``tensors`` that are parameters (the rest are buffers).
        widths: Every distinct channel formula seen on an activation; the latency model
            matches the engine's shapes against these.
        unknown: Operators without a rule, with how often each was met (their axes are frozen).
        blocks: Removable units.
        operators: Names of the recorded operators, in order.
        recording: What the forward pass did, for the stage that applies plans; opaque here.
    """

    axes: tuple[Axis, ...]
    layers: tuple[Layer, ...]
    tensors: Mapping[str, tuple[Polynomial, ...]]
    parameters: frozenset[str]
    widths: tuple[Polynomial, ...]
    unknown: Mapping[str, int]
    blocks: tuple[Block, ...] = ()
    operators: tuple[str, ...] = ()
    recording: Any = field(default=None, repr=False)
    _by_name: dict[str, Axis] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self._by_name.update({axis.name: axis for axis in self.axes})

    def __getitem__(self, name: str) -> Axis:
        return self._by_name[name]

    @property
    def prunable(self) -> tuple[Axis, ...]:
        """The axes that may lose channels."""
        return tuple(axis for axis in self.axes if axis.frozen is None and axis.size > 1)

    @property
    def ties(self) -> tuple[tuple[str, ...], ...]:
        """Groups of prunable axes that must keep equally many channels."""
        found: dict[int, list[str]] = {}
        for axis in self.prunable:
            if axis.tie is not None:
                found.setdefault(axis.tie, []).append(axis.name)
        return tuple(tuple(names) for names in found.values() if len(names) > 1)

    def without(self, removed: Sequence[str]) -> Graph:
        """The graph once the named blocks are taken out, with the axes that then remain."""
        prefixes = tuple(f"{name}." for name in removed)
        if not prefixes:
            return self
        cut = (
            replace(
                axis, members=tuple(m for m in axis.members if not m.tensor.startswith(prefixes))
            )
            for axis in self.axes
        )
        axes = tuple(axis for axis in cut if axis.members)
        left = {axis.name for axis in axes}
        return replace(
            self,
            axes=axes,
            widths=tuple(width for width in self.widths if width.axes <= left),
            layers=tuple(x for x in self.layers if not f"{x.name}.".startswith(prefixes)),
            tensors={n: d for n, d in self.tensors.items() if not n.startswith(prefixes)},
            parameters=frozenset(n for n in self.parameters if not n.startswith(prefixes)),
            blocks=tuple(b for b in self.blocks if not f"{b.name}.".startswith(prefixes)),
            _by_name={},
        )

    def sizes(self, kept: Counts) -> dict[str, int]:
        """Fill ``kept`` up with the full size of every axis that it leaves out."""
        return {axis.name: kept.get(axis.name, axis.size) for axis in self.axes}

    def shapes(self, kept: Counts) -> dict[str, tuple[int, ...]]:
        """Shape of every stored tensor once ``kept`` channels per axis remain."""
        sizes = self.sizes(kept)
        return {name: tuple(d(sizes) for d in dims) for name, dims in self.tensors.items()}

    def params(self, kept: Counts | None = None) -> int:
        """Number of parameters (buffers not counted) once ``kept`` channels remain."""
        sizes = self.sizes(kept or {})
        return sum(math.prod(d(sizes) for d in self.tensors[n]) for n in self.parameters)

    def macs(self, kept: Counts | None = None) -> int:
        """Multiply-accumulates of one forward pass on the example input."""
        sizes = self.sizes(kept or {})
        return sum(layer.macs(sizes) for layer in self.layers)
