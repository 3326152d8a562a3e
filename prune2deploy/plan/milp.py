"""Allocate exactly: a multiple-choice knapsack with pair variables, solved by HiGHS.

In: an evaluator whose present assignment is a good one. Out: options, a bound on the objective,
and whether both are exact.

One binary variable per option; for every two choices that some operator couples, one continuous
variable per pair of options, tied to the binaries by its marginals (the local-consistency
formulation of pairwise problems; Halp and its successors pose the same knapsack). Operators of
more than two choices (long concatenations) are split into their products of at most two widths,
with the residual as it is at the present assignment (and the third width of a product, too);
they are counted, the solution is checked with the true costs, and the bound is then not exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from prune2deploy.plan.choices import Floats, Ints
from prune2deploy.plan.evaluate import Evaluator

_PAIRS = 250_000  # pair variables beyond which options are thinned out


@dataclass(frozen=True, eq=False)
class Solved:
    """What the solver came back with.

    Attributes:
        chosen: Options, or ``None`` when it found no assignment within its time.
        bound: No assignment is worth more than this (on the options that were offered).
        linearised: Number of operators whose cost was approximated.
        thinned: Whether some options were left out to keep the problem small.
    """

    chosen: Ints | None
    bound: float
    linearised: int
    thinned: bool


Tables = Mapping[tuple[int, ...], Floats]
"""Cost against each limit by choices involved: (limits, options) or (limits, options, options)."""


def solve(evaluator: Evaluator, *, seconds: float, gap: float = 1e-4) -> Solved:
    """Maximise worth within the limits.

    Args:
        evaluator: Holds the problem and a reference assignment; it is left as it was.
        seconds: Time limit of the solver.
        gap: Relative optimality gap at which the solver may stop.
    """
    tables, constant, linearised = _tables(evaluator)
    offered = _offered(evaluator, tables)
    every = evaluator.problem.choices
    thinned = any(len(o) < len(c.options) for o, c in zip(offered, every, strict=True))
    tables = {
        key: table[np.ix_(np.arange(len(table)), *(offered[g] for g in key))]
        for key, table in tables.items()
    }
    model = _Model(evaluator, offered, tables, evaluator.limits - constant)
    result = milp(
        -model.worth,
        constraints=model.constraints(),
        bounds=Bounds(0, 1),
        integrality=model.integrality,
        options={"time_limit": seconds, "mip_rel_gap": gap},
    )
    bound = -float(result.mip_dual_bound) if result.mip_dual_bound is not None else np.inf
    if result.x is None:
        return Solved(None, bound, linearised, thinned)
    starts = np.cumsum([0, *(len(o) for o in offered)])
    picks = [
        int(offered[g][np.argmax(result.x[starts[g] : starts[g + 1]])]) for g in range(len(offered))
    ]
    return Solved(np.array(picks, dtype=np.int64), bound, linearised, thinned)


def _tables(evaluator: Evaluator) -> tuple[dict[tuple[int, ...], Floats], Floats, int]:
    """Sum the operators by the choices they involve; what involves none is constant."""
    limits = len(evaluator.limits)
    constant = evaluator.constant.copy()
    tables: dict[tuple[int, ...], Floats] = {}
    linearised = 0
    for operator in range(len(evaluator.terms.cost)):
        involved = evaluator.involved(operator)
        if len(involved) > 2:
            linearised += 1
            parts = evaluator.spread(operator)
        else:
            parts = {involved: evaluator.table(operator, involved)}
        limit = int(evaluator.terms.limit[operator])
        for key, table in parts.items():
            if not key:
                constant[limit] += float(table)
                continue
            if key not in tables:
                tables[key] = np.zeros((limits, *table.shape))
            tables[key][limit] += table
    return tables, constant, linearised


def _offered(evaluator: Evaluator, tables: Tables) -> list[Ints]:
    """Options to offer: all, or evenly thinned ones with the present option among them."""
    sizes = [len(c.options) for c in evaluator.problem.choices]
    most = max(sizes, default=1)
    while most > 4 and _pairs(tables, [min(s, most) for s in sizes]) > _PAIRS:
        most -= 1
    offered = []
    for size, present in zip(sizes, evaluator.chosen, strict=True):
        spread = np.linspace(0, size - 1, min(size, most)).round().astype(np.int64)
        offered.append(np.unique(np.append(spread, present)))
    return offered


def _pairs(tables: Tables, sizes: list[int]) -> int:
    return sum(sizes[key[0]] * sizes[key[1]] for key in tables if len(key) == 2)


class _Model:
    """Variables and constraints in the solver's terms."""

    def __init__(
        self, evaluator: Evaluator, offered: list[Ints], tables: Tables, room: Floats
    ) -> None:
        self._sizes = [len(o) for o in offered]
        self._starts = np.cumsum([0, *self._sizes])
        self._tables = tables
        self._room = room
        singles = int(self._starts[-1])
        self._pairs = [key for key in tables if len(key) == 2]
        lengths = [self._sizes[g] * self._sizes[h] for g, h in self._pairs]
        self._pair_starts = singles + np.cumsum([0, *lengths])
        self.variables = int(self._pair_starts[-1])
        worths = [c.worth[o] for c, o in zip(evaluator.problem.choices, offered, strict=True)]
        self.worth = np.zeros(self.variables)
        self.worth[:singles] = np.concatenate(worths)
        self.integrality = np.zeros(self.variables)
        self.integrality[:singles] = 1

    def constraints(self) -> list[LinearConstraint]:
        """Costs within limits; one option per choice; pairs agree with their choices."""
        costs = np.zeros((len(self._room), self.variables))
        for key, table in self._tables.items():
            start = self._starts[key[0]] if len(key) == 1 else self._pair_start(key)
            flat = table.reshape(len(table), -1)
            costs[:, start : start + flat.shape[1]] += flat
        scale = np.maximum(np.abs(self._room), 1e-12)
        limits = LinearConstraint(costs / scale[:, None], -np.inf, self._room / scale)
        rows, columns, values, wanted = self._equalities()
        shape = (len(wanted), self.variables)
        equal = coo_array((values, (rows, columns)), shape=shape).tocsr()
        return [limits, LinearConstraint(equal, wanted, wanted)]

    def _pair_start(self, key: tuple[int, ...]) -> int:
        return int(self._pair_starts[self._pairs.index((key[0], key[1]))])

    def _equalities(self) -> tuple[list[int], list[int], list[float], list[float]]:
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        wanted = [1.0] * len(self._sizes)
        for g, size in enumerate(self._sizes):
            rows += [g] * size
            columns += range(self._starts[g], self._starts[g + 1])
            values += [1.0] * size
        for (g, h), start in zip(self._pairs, self._pair_starts, strict=False):
            number = int(start) + np.arange(self._sizes[g] * self._sizes[h])
            place = number.reshape(self._sizes[g], self._sizes[h])
            for choice, lines in ((g, place), (h, place.T)):
                for option, line in enumerate(lines):
                    rows += [len(wanted)] * (len(line) + 1)
                    columns += [*line.tolist(), int(self._starts[choice]) + option]
                    values += [1.0] * len(line) + [-1.0]
                    wanted.append(0.0)
        return rows, columns, values, wanted
