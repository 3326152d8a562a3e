"""The work of all operators as sums of products of chosen widths, as ``evaluate`` needs it.

In: a problem. Out: its limits, the monomials of every operator that a choice or a block changes,
and what the others cost. Where parameters or multiply-accumulates are capped, every parameter and
every layer counts as one more operator, with the cap as its limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prune2deploy.graph.axes import Polynomial
from prune2deploy.plan.choices import Floats, Ints, Problem
from prune2deploy.plan.latency_model import OperatorModel, time_ns, widths
from prune2deploy.plan.work import NOTHING, total
from prune2deploy.units import NS_PER_MS

Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Terms:
    """Work of all operators as monomials over choice variables.

    Variables are numbered: choice ``g`` as it is (``g``), rounded up to blocks of channels
    (``g + n``), and the constant one (``2 n``).

    Attributes:
        coefficient: float array (terms,).
        variables: int array (terms, degree), padded with the constant one.
        row: int array (terms,): three times the operator plus which kind of work.
        cost: float array (operators, 4), milliseconds (or a count) per unit of work and call.
        seen: float array (operators, builds, 3).
        residual: float array (operators, builds), NaN where there is none.
        limit: int array (operators,): which limit the operator counts towards.
        held: bool array (operators, removable blocks): which blocks it goes with; it is gone as
            soon as one of them is.
    """

    coefficient: Floats
    variables: Ints
    row: Ints
    cost: Floats
    seen: Floats
    residual: Floats
    limit: Ints
    held: Flags


class _Row(NamedTuple):
    """One operator before it is taken apart; ``blocks`` are numbers of those it goes with."""

    cost: Floats
    formulas: tuple[Polynomial, Polynomial, Polynomial]
    padded: bool
    limit: int
    seen: Floats
    residual: Floats
    blocks: frozenset[int]

    @property
    def axes(self) -> frozenset[str]:
        return frozenset().union(*(formula.axes for formula in self.formulas))


@dataclass
class _Monomials:
    """Terms as they are found."""

    coefficient: list[float] = field(default_factory=list)
    free: list[list[int]] = field(default_factory=list)
    row: list[int] = field(default_factory=list)


def collect(problem: Problem) -> tuple[Floats, Terms, Floats]:
    """Limits, monomials, and the cost against each limit that neither choice nor block changes."""
    limits = [problem.model.operator_budget_ms(problem.budget_ms)]
    rows = [_timed(problem, number, o) for number, o in enumerate(problem.model.operators)]
    graph, lost = problem.graph, _lost(problem)
    if problem.max_params is not None:
        rows += [
            _counted(problem, total(graph.tensors[name]), len(limits), lost[name])
            for name in sorted(graph.parameters)
        ]
        limits.append(float(problem.max_params))
    if problem.max_macs is not None:
        rows += [
            _counted(problem, layer.macs, len(limits), lost[layer.name]) for layer in graph.layers
        ]
        limits.append(float(problem.max_macs))
    where = {axis for choice in problem.choices for axis in choice.axes}
    changing = [row for row in rows if row.blocks or row.axes & where]
    steady = [row for row in rows if not (row.blocks or row.axes & where)]
    return np.array(limits), _terms(problem, changing), _constant(problem, steady, len(limits))


def _timed(problem: Problem, number: int, operator: OperatorModel) -> _Row:
    """An operator of the engine, in milliseconds."""
    cost = np.array(operator.cost) * operator.share / NS_PER_MS
    work = operator.work
    formulas = (work.macs, work.read, work.written)
    named = frozenset(b for b, block in enumerate(problem.blocks) if number in block.operators)
    blocks = named | _owners(problem, work.axes)
    shape = (operator.padded, 0, operator.seen, operator.residual)
    return _Row(cost, formulas, *shape, blocks)


def _counted(problem: Problem, formula: Polynomial, limit: int, lost: frozenset[int]) -> _Row:
    """Something that is counted and not timed."""
    unit = np.array([1.0, 0.0, 0.0, 0.0])
    blocks = lost | _owners(problem, formula.axes)
    return _Row(
        unit, (formula, NOTHING, NOTHING), False, limit, np.zeros((0, 3)), np.zeros(0), blocks
    )


def _owners(problem: Problem, axes: frozenset[str]) -> frozenset[int]:
    """Numbers of the blocks that take one of these axes with them."""
    return frozenset(b for b, block in enumerate(problem.blocks) if axes & block.axes)


def _lost(problem: Problem) -> Mapping[str, frozenset[int]]:
    """Numbers of the blocks that take a parameter, or a layer, with them, by its name."""
    graph = problem.graph
    every = {*graph.parameters, *(layer.name for layer in graph.layers)}
    if problem.max_params is None and problem.max_macs is None:
        return {}
    found: dict[str, frozenset[int]] = dict.fromkeys(every, frozenset())
    for number, block in enumerate(problem.blocks):
        left = graph.without((block.name,))
        for name in every - left.parameters - {layer.name for layer in left.layers}:
            found[name] |= {number}
    return found


def _constant(problem: Problem, rows: Sequence[_Row], limits: int) -> Floats:
    sizes = widths(problem.graph.sizes({}), {}, problem.model.multiple)
    constant = np.zeros(limits)
    for row in rows:
        fixed = sizes[row.padded]
        work = np.array([float(formula(fixed)) for formula in row.formulas])
        constant[row.limit] += float(time_ns(work, row.cost, row.seen, row.residual))
    return constant


def _terms(problem: Problem, rows: Sequence[_Row]) -> Terms:
    found = _Monomials()
    for number, row in enumerate(rows):
        _take_apart(problem, number, row, found)
    count = len(problem.choices)
    degree = max((len(free) for free in found.free), default=1) or 1
    variables = [free + [2 * count] * (degree - len(free)) for free in found.free]
    builds = max((len(row.residual) for row in rows), default=0)
    held = np.zeros((len(rows), len(problem.blocks)), dtype=bool)
    for number, row in enumerate(rows):
        held[number, list(row.blocks)] = True
    return Terms(
        np.array(found.coefficient, dtype=np.float64),
        np.array(variables, dtype=np.int64).reshape(-1, degree),
        np.array(found.row, dtype=np.int64),
        np.array([row.cost for row in rows]).reshape(-1, 4),
        np.array([_fill(row.seen, builds, 0.0) for row in rows]).reshape(len(rows), builds, 3),
        np.array([_fill(row.residual, builds, np.nan) for row in rows]).reshape(len(rows), builds),
        np.array([row.limit for row in rows], dtype=np.int64),
        held,
    )


def _take_apart(problem: Problem, number: int, row: _Row, found: _Monomials) -> None:
    """Add the monomials of one operator; axes without a choice are taken at their full size."""
    count = len(problem.choices) if row.padded else 0
    where = {axis: g for g, choice in enumerate(problem.choices) for axis in choice.axes}
    fixed = widths(problem.graph.sizes({}), {}, problem.model.multiple)[row.padded]
    for part, formula in enumerate(row.formulas):
        for coefficient, axes in formula.terms:
            bound = [fixed[a] for a in axes if a not in where]
            value = float(coefficient) * float(np.prod(bound)) if bound else float(coefficient)
            found.coefficient.append(value)
            found.free.append([where[a] + count for a in axes if a in where])
            found.row.append(3 * number + part)


def _fill(values: Floats, length: int, blank: float) -> Floats:
    missing = np.full((length - len(values), *values.shape[1:]), blank)
    return np.concatenate([values, missing])
