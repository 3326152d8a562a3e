"""Matches the operators of built engines to the graph by how their shapes vary.

In: profiles of several builds of one architecture at different widths. Out: for every operator
its symbolic shapes, i.e. each dimension as a formula of axis widths. A runtime's names need not
resemble the model's: a dimension is recognised by taking the values of one formula of the graph
in all builds at once, so builds whose widths tell the axes apart identify them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction

from prune2deploy.graph.axes import Counts, Graph, Layer, Polynomial
from prune2deploy.plan.pairing import Seen
from prune2deploy.plan.work import (
    NO_WORK,
    Form,
    Work,
    channel_dim,
    contracts,
    signature,
    weight_position,
    work_of,
)
from prune2deploy.timing import OperatorTiming

Vector = tuple[int, ...]
_BLOCKS = (4, 8, 16, 32, 64)  # runtimes may show channels rounded up to their vector width


@dataclass(frozen=True)
class Identified:
    """An operator with its work as formulas.

    Attributes:
        seen: The operator across the builds in which its tensors have the commonest ranks.
        work: Its work; constant where it does not depend on any axis.
        signature: What operators of equal unit cost share.
        matched: False when some dimension varies and no formula explains it.
        present: Number of builds that contain it, whatever its ranks.
    """

    seen: Seen
    work: Work
    signature: str
    matched: bool
    present: int


@dataclass
class Identifier:
    """Recognises formulas of a graph by their values in several builds.

    Attributes:
        graph: Supplies the formulas.
        counts: Kept channels of each build.
    """

    graph: Graph
    counts: Sequence[Counts]
    _sizes: list[dict[str, int]] = field(default_factory=list)
    _formulas: list[Polynomial] = field(default_factory=list)
    _tables: dict[tuple[int, ...], dict[Vector, list[Polynomial]]] = field(default_factory=dict)
    _recent: dict[Polynomial, int] = field(default_factory=dict)
    _cursor: int = -1

    def __post_init__(self) -> None:
        self._sizes = [self.graph.sizes(counts) for counts in self.counts]
        singles = [Polynomial(((1, (axis.name,)),)) for axis in self.graph.axes]
        sides = [
            width for layer in self.graph.layers for width in (layer.in_width, layer.out_width)
        ]
        stored = [dim for dims in self.graph.tensors.values() for dim in dims]
        everything = [*self.graph.widths, *sides, *singles, *stored]
        self._formulas = [p for p in dict.fromkeys(everything) if p.axes]

    def identify(self, seen: Seen) -> Identified:
        """Give one operator its formulas; call in execution order."""
        present = len(seen.timings)
        alike = _alike(seen)
        if len(alike.timings) == 1 < present:
            return self._constant(seen)
        seen = alike
        builds = tuple(seen.timings)
        timings = [seen.timings[b] for b in builds]
        first = timings[0]
        shapes = (*first.input_shapes, *first.output_shapes)
        columns = [tuple(t.input_shapes) + tuple(t.output_shapes) for t in timings]
        vectors = [
            [tuple(c[i][d] for c in columns) for d in range(len(shape))]
            for i, shape in enumerate(shapes)
        ]
        layer = self._layer(first, vectors, builds)
        forms, matched = self._forms(vectors, builds, layer)
        if not matched:
            return self._constant(seen)
        inputs, outputs = forms[: len(first.input_shapes)], forms[len(first.input_shapes) :]
        weight = weight_position(first.kind, first.input_shapes, first.output_shapes)
        known = None if layer is None else Work(layer.macs, layer.in_width, layer.out_width)
        work = work_of(first.kind, inputs, outputs, weight, known)
        return Identified(seen, work, signature(first.kind, inputs, outputs), True, present)

    def _constant(self, seen: Seen) -> Identified:
        signature = f"{seen.kind}:{seen.name}"
        return Identified(seen, NO_WORK, signature, False, len(seen.timings))

    def _forms(
        self, vectors: list[list[Vector]], builds: tuple[int, ...], layer: Layer | None
    ) -> tuple[list[Form], bool]:
        prefer = [] if layer is None else [layer.in_width, layer.out_width]
        forms: list[Form] = []
        for dims in vectors:
            form = []
            for vector in dims:
                formula = self._formula(vector, builds, prefer)
                if formula is None:
                    return [], False
                form.append(formula)
            forms.append(tuple(form))
        return forms, True

    def _formula(
        self, vector: Vector, builds: tuple[int, ...], prefer: Sequence[Polynomial]
    ) -> Polynomial | None:
        if len(set(vector)) == 1:
            return Polynomial.constant(vector[0])
        found = self._candidates(vector, builds)
        if not found:
            return None
        liked = [formula for formula in found if formula in prefer]
        best = liked[0] if liked else max(found, key=lambda f: self._recent.get(f, -1))
        self._recent[best] = 1 + max(self._recent.values(), default=-1)
        return best

    def _candidates(self, vector: Vector, builds: tuple[int, ...]) -> list[Polynomial]:
        table = self._table(builds)
        exact = [f for f in table.get(_primitive(vector), ()) if self._values(f, builds) == vector]
        if exact:
            return exact
        scaled = [
            _scale(f, Fraction(vector[0], self._values(f, builds)[0]))
            for f in table.get(_primitive(vector), ())
        ]
        whole = [f for f in scaled if f is not None]
        if whole:
            return whole
        return [f for f in self._formulas if _rounds_to(self._values(f, builds), vector)]

    def _table(self, builds: tuple[int, ...]) -> dict[Vector, list[Polynomial]]:
        if builds not in self._tables:
            table: dict[Vector, list[Polynomial]] = {}
            for formula in self._formulas:
                table.setdefault(_primitive(self._values(formula, builds)), []).append(formula)
            self._tables[builds] = table
        return self._tables[builds]

    def _values(self, formula: Polynomial, builds: tuple[int, ...]) -> Vector:
        return tuple(formula(self._sizes[b]) for b in builds)

    def _layer(
        self, timing: OperatorTiming, vectors: list[list[Vector]], builds: tuple[int, ...]
    ) -> Layer | None:
        """The next layer of the graph whose widths vary as this operator's do."""
        if not contracts(timing.kind) or not timing.input_shapes or not timing.output_shapes:
            return None
        into, made = timing.input_shapes[0], timing.output_shapes[0]
        if not into or not made:
            return None
        read = vectors[0][channel_dim(timing.kind, into)]
        written = vectors[len(timing.input_shapes)][channel_dim(timing.kind, made)]
        fits = [
            i
            for i, layer in enumerate(self.graph.layers)
            if self._values(layer.in_width, builds) == read
            and self._values(layer.out_width, builds) == written
        ]
        if not fits:
            return None
        ahead = [i for i in fits if i > self._cursor]
        self._cursor = ahead[0] if ahead else fits[-1]
        return self.graph.layers[self._cursor]


def _alike(seen: Seen) -> Seen:
    """The operator in those builds that show its tensors with the commonest ranks.

    A module that was captured may lack an input that the model's own code has (a bias that was
    folded, say), and the unpruned build is of the model's own code.
    """
    ranks = {build: timing.ranks for build, timing in seen.timings.items()}
    common = Counter(ranks.values()).most_common(1)[0][0]
    return replace(seen, timings={b: t for b, t in seen.timings.items() if ranks[b] == common})


def _primitive(vector: Vector) -> Vector:
    divisor = math.gcd(*vector) or 1
    return tuple(v // divisor for v in vector)


def _scale(formula: Polynomial, factor: Fraction) -> Polynomial | None:
    terms = [(c * factor, axes) for c, axes in formula.terms]
    if any(c.denominator != 1 for c, _ in terms):
        return None
    return Polynomial(tuple((int(c), axes) for c, axes in terms))


def _rounds_to(values: Vector, vector: Vector) -> bool:
    return any(
        all(-(-v // block) * block == shown for v, shown in zip(values, vector, strict=True))
        for block in _BLOCKS
    )
