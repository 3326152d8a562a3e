"""Cost of changing one choice, for all its options at once: the inner loop of every allocator.

In: a problem. Out: an evaluator that holds a current assignment and answers what latency (and
parameters and multiply-accumulates, where capped) would be for every option of one choice. An
operator's work is a polynomial of widths, so only the terms that contain the choice are computed
again; a question takes some tens of microseconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune2deploy.graph.axes import Polynomial
from prune2deploy.plan.choices import Floats, Ints, Problem, total_params
from prune2deploy.plan.latency_model import OperatorModel, time_ns
from prune2deploy.units import NS_PER_MS


@dataclass(frozen=True, eq=False)
class Terms:
    """Work of all operators as monomials over choice variables.

    Variables are numbered: choice ``g`` as it is (``g``), rounded up to blocks (``g + n``), and
    the constant one (``2 n``).

    Attributes:
        coefficient: float array (terms,).
        variables: int array (terms, degree), padded with the constant one.
        row: int array (terms,): three times the operator plus which kind of work.
        cost: float array (operators, 4), milliseconds (or a count) per unit of work and call.
        seen: float array (operators, builds, 3).
        residual: float array (operators, builds), NaN where there is none.
        limit: int array (operators,): which limit the operator counts towards.
    """

    coefficient: Floats
    variables: Ints
    row: Ints
    cost: Floats
    seen: Floats
    residual: Floats
    limit: Ints


@dataclass(frozen=True, eq=False)
class _Local:
    """What concerns one choice.

    Attributes:
        operators: int array, operators that depend on it.
        rows: int array (operators, 3), their rows of work.
        terms: int array, the monomials that contain it.
        power: float array (terms, options), its own factor in each monomial.
        scatter: float array (3 * operators, terms), adds monomials into rows.
    """

    operators: Ints
    rows: Ints
    terms: Ints
    power: Floats
    scatter: Floats


class Evaluator:
    """A current assignment of options to choices, with its costs.

    Attributes:
        problem: What is being allocated.
        limits: float array: the budget of the operators in milliseconds, then the caps.
        constant: float array, the cost against each limit that no choice changes.
        chosen: int array, the option that each choice takes at present.
        totals: float array, the present cost against each limit.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        model = problem.model
        self.limits, self.terms, self.constant = _terms(problem)
        blocks = [-(-c.options // model.multiple) * model.multiple for c in problem.choices]
        self._values = [
            np.array([c.options, b], dtype=np.float64)
            for c, b in zip(problem.choices, blocks, strict=True)
        ]
        self._locals = [self._local(g) for g in range(len(problem.choices))]
        self.chosen = np.zeros(0, dtype=np.int64)
        self.totals = np.zeros(0)
        self.assign([len(c.options) - 1 for c in problem.choices])

    def assign(self, chosen: Sequence[int] | Ints) -> None:
        """Take an option for every choice."""
        self.chosen = np.array(chosen, dtype=np.int64)
        values = [v[:, o] for v, o in zip(self._values, self.chosen, strict=True)]
        pairs = np.array(values).reshape(-1, 2)
        self._x = np.concatenate([pairs[:, 0], pairs[:, 1], [1.0]])
        self._monomial = self.terms.coefficient * self._x[self.terms.variables].prod(axis=1)
        operators = len(self.terms.cost)
        every: Ints = np.arange(operators, dtype=np.int64)
        work = np.bincount(self.terms.row, self._monomial, 3 * operators)
        self._work = work.astype(np.float64)
        self._time = self._times(every, self._work.reshape(-1, 3, 1))[:, 0]
        self.totals = self.constant + np.bincount(self.terms.limit, self._time, len(self.limits))

    def costs(self, choice: int) -> Floats:
        """Cost against each limit for every option of one choice, float array (limits, options)."""
        local = self._locals[choice]
        times = self._times(local.operators, self._new_work(choice))
        change = times - self._time[local.operators][:, None]
        found = np.repeat(self.totals[:, None], times.shape[1], axis=1)
        np.add.at(found, self.terms.limit[local.operators], change)
        return found

    def set(self, choice: int, option: int) -> None:
        """Give one choice another option."""
        local = self._locals[choice]
        work = self._new_work(choice)[:, :, option]
        times = self._times(local.operators, work[:, :, None])[:, 0]
        change = times - self._time[local.operators]
        np.add.at(self.totals, self.terms.limit[local.operators], change)
        self._time[local.operators] = times
        self._work[local.rows] = work
        own = local.power[:, option] / local.power[:, self.chosen[choice]]
        self._monomial[local.terms] *= own
        self.chosen[choice] = option

    def feasible(self, totals: Floats | None = None) -> bool:
        """Whether the present (or given) costs keep every limit."""
        return bool((self.totals if totals is None else totals).__le__(self.limits + 1e-9).all())

    def involved(self, operator: int) -> tuple[int, ...]:
        """The choices that an operator's cost depends on."""
        mine = self.terms.row // 3 == operator
        count = len(self.problem.choices)
        variables = np.unique(self.terms.variables[mine])
        return tuple(sorted({int(v) % count for v in variables if v < 2 * count}))

    def table(self, operator: int, choices: Sequence[int]) -> Floats:
        """Cost of an operator over the options of ``choices``, the others as they are at present.

        Returns:
            Float array with one dimension per entry of ``choices``.
        """
        shape = tuple(len(self.problem.choices[c].options) for c in choices)
        work = np.zeros((*shape, 3))
        for term in np.flatnonzero(self.terms.row // 3 == operator):
            work[..., self.terms.row[term] % 3] += self._product(int(term), choices)
        cost, seen = self.terms.cost[operator], self.terms.seen[operator]
        return time_ns(work, cost, seen, self.terms.residual[operator])

    def spread(self, operator: int) -> dict[tuple[int, ...], Floats]:
        """An operator's cost as a sum of tables over at most two choices each; approximate.

        Exact at the present assignment. The residual is taken as it is there, and so are the
        choices beyond the second of a product.
        """
        cost = self.terms.cost[operator]
        present = float(self.table(operator, ()))
        work = self._work.reshape(-1, 3)[operator]
        factor = present / max(float(work @ cost[:3] + cost[3]), 1e-300)
        parts: dict[tuple[int, ...], Floats] = {(): np.array(factor * cost[3])}
        count = len(self.problem.choices)
        for term in np.flatnonzero(self.terms.row // 3 == operator):
            own = self.terms.variables[term]
            key = tuple(sorted({int(v) % count for v in own if v < 2 * count})[:2])
            price = factor * cost[self.terms.row[term] % 3]
            parts[key] = parts.get(key, np.zeros(())) + price * self._product(int(term), key)
        return parts

    def _product(self, term: int, choices: Sequence[int]) -> Floats:
        """A monomial over the options of ``choices``, the others as they are at present."""
        count = len(self.problem.choices)
        shape = tuple(len(self.problem.choices[c].options) for c in choices)
        value = np.full(shape, self.terms.coefficient[term])
        for variable in self.terms.variables[term]:
            kind, choice = divmod(int(variable), count)
            if kind == 2:  # the constant one
                continue
            if choice in choices:
                place = list(choices).index(choice)
                line = [-1 if i == place else 1 for i in range(len(shape))]
                value = value * self._values[choice][kind].reshape(line)
            else:
                value = value * self._values[choice][kind][self.chosen[choice]]
        return value

    def _times(self, operators: Ints, work: Floats) -> Floats:
        """Cost of operators, (operators, options), from their work (operators, 3, options)."""
        cost = self.terms.cost[operators][:, None, :]
        seen = self.terms.seen[operators][:, None]
        residual = self.terms.residual[operators][:, None]
        return time_ns(work.transpose(0, 2, 1), cost, seen, residual)

    def _new_work(self, choice: int) -> Floats:
        local = self._locals[choice]
        now = self._monomial[local.terms]
        rest = now / local.power[:, self.chosen[choice]]
        change = local.scatter @ (rest[:, None] * local.power - now[:, None])
        base = self._work[local.rows]
        return np.asarray(base[:, :, None] + change.reshape(*base.shape, change.shape[-1]))

    def _local(self, choice: int) -> _Local:
        count = len(self.problem.choices)
        raw = (self.terms.variables == choice).sum(axis=1)
        padded = (self.terms.variables == choice + count).sum(axis=1)
        terms = np.flatnonzero(raw + padded)
        operators = np.unique(self.terms.row[terms] // 3)
        rows = 3 * operators[:, None] + np.arange(3)
        values = self._values[choice]
        power = values[0] ** raw[terms, None] * values[1] ** padded[terms, None]
        scatter = (rows.reshape(-1, 1) == self.terms.row[terms][None, :]).astype(np.float64)
        return _Local(operators, rows, terms, power, scatter)


def _terms(problem: Problem) -> tuple[Floats, Terms, Floats]:
    """Limits, monomials, and the cost against each limit that no choice changes."""
    limits = [problem.model.operator_budget_ms(problem.budget_ms)]
    nothing = np.zeros((0, 3)), np.zeros(0)
    rows = [(_ms(o), (o.work.macs, o.work.read, o.work.written), o.padded, 0, o.seen, o.residual)
            for o in problem.model.operators]  # fmt: skip
    zero = Polynomial.constant(0)
    unit = np.array([1.0, 0.0, 0.0, 0.0])
    if problem.max_params is not None:
        formulas = total_params(problem.graph)
        rows += [(unit, (f, zero, zero), False, len(limits), *nothing) for f in formulas]
        limits.append(float(problem.max_params))
    if problem.max_macs is not None:
        layers = problem.graph.layers
        rows += [(unit, (y.macs, zero, zero), False, len(limits), *nothing) for y in layers]
        limits.append(float(problem.max_macs))
    return _collect(problem, rows, np.array(limits))


def _ms(operator: OperatorModel) -> Floats:
    return np.array(operator.cost) * operator.share / NS_PER_MS


_Row = tuple[Floats, tuple[Polynomial, Polynomial, Polynomial], bool, int, Floats, Floats]


def _collect(
    problem: Problem, rows: Sequence[_Row], limits: Floats
) -> tuple[Floats, Terms, Floats]:
    where = {axis: g for g, choice in enumerate(problem.choices) for axis in choice.axes}
    count = len(problem.choices)
    sizes = {axis.name: axis.size for axis in problem.graph.axes}
    kept = [row for row in rows if any(formula.axes & where.keys() for formula in row[1])]
    constant = np.zeros(len(limits))
    for cost, formulas, padded, limit, seen, residual in rows:
        if not any(formula.axes & where.keys() for formula in formulas):
            fixed = _sizes(sizes, padded, problem.model.multiple)
            work = np.array([float(formula(fixed)) for formula in formulas])
            constant[limit] += float(time_ns(work, cost, seen, residual))
    found: list[tuple[float, list[int], int]] = []
    for number, (_, formulas, padded, *_rest) in enumerate(kept):
        fixed = _sizes(sizes, padded, problem.model.multiple)
        for part, formula in enumerate(formulas):
            for coefficient, axes in formula.terms:
                free = [where[a] + (count if padded else 0) for a in axes if a in where]
                bound = [fixed[a] for a in axes if a not in where]
                value = float(coefficient) * float(np.prod(bound)) if bound else float(coefficient)
                found.append((value, free, 3 * number + part))
    degree = max((len(free) for _, free, _ in found), default=1) or 1
    variables = [free + [2 * count] * (degree - len(free)) for _, free, _ in found]
    builds = max((len(row[5]) for row in kept), default=0)
    terms = Terms(
        np.array([value for value, _, _ in found]),
        np.array(variables, dtype=np.int64).reshape(-1, degree),
        np.array([row for _, _, row in found], dtype=np.int64),
        np.array([row[0] for row in kept]).reshape(-1, 4),
        np.array([_fill(row[4], builds, 0.0) for row in kept]).reshape(len(kept), builds, 3),
        np.array([_fill(row[5], builds, np.nan) for row in kept]).reshape(len(kept), builds),
        np.array([row[3] for row in kept], dtype=np.int64),
    )
    return limits, terms, constant


def _sizes(sizes: dict[str, int], padded: bool, multiple: int) -> dict[str, int]:
    return {n: -(-s // multiple) * multiple for n, s in sizes.items()} if padded else sizes


def _fill(values: Floats, length: int, blank: float) -> Floats:
    missing = np.full((length - len(values), *values.shape[1:]), blank)
    return np.concatenate([values, missing])
