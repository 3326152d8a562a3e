"""Allocate exactly: a multiple-choice knapsack with pair variables, solved by HiGHS.

In: an evaluator whose present assignment is a good one. Out: options, blocks, a bound on the
objective, and whether all are exact.

One binary variable per option; for every two choices that some operator couples, one continuous
variable per pair of options, tied to the binaries by its marginals (the local-consistency
formulation of pairwise problems; Halp and its successors pose the same knapsack). Operators of
more than two choices (long concatenations) are split into their products of at most two widths,
with the residual as it is at the present assignment (and the third width of a product, too);
the solution is checked with the true costs, and the bound is then not exact.

A block that may go is one more choice, between *out* and *in*. The choices inside it have one
more option, *out*, at which everything that involves them costs nothing; it is taken if and only
if the block is out. What goes with a block and involves no such choice (the addition behind it)
is coupled to the block itself. All this is exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from prune2deploy.plan.choices import Floats, Ints
from prune2deploy.plan.evaluate import Evaluator
from prune2deploy.plan.terms import Flags

_PAIRS = 250_000  # pair variables beyond which options are thinned out
_GAP = 1e-4  # relative optimality gap at which the solver may stop


@dataclass(frozen=True, eq=False)
class Solved:
    """What the solver came back with.

    Attributes:
        chosen: Options, or ``None`` when it found no assignment within its time. Choices that
            went with blocks have the option of the reference.
        kept: Which blocks are kept, bool array.
        bound: No assignment is worth more than this.
        exact: False where the cost of an operator was approximated, or options were left out to
            keep the problem small: the bound is then an estimate.
    """

    chosen: Ints | None
    kept: Flags
    bound: float
    exact: bool


Tables = Mapping[tuple[int, ...], Floats]
"""Cost against each limit, then worth, by what is involved: (limits + 1, states, ...).

Involved are choices and blocks by number, the first block behind the last choice. The states of a
choice are its options, and *out* where it goes with blocks; those of a block are *out* and *in*.
"""


def solve(evaluator: Evaluator, *, seconds: float) -> Solved:
    """Maximise worth within the limits.

    Args:
        evaluator: Holds the problem and a reference assignment; it is left as it was.
        seconds: Time limit of the solver.
    """
    tables, constant, exact = _tables(evaluator)
    offered = _offered(evaluator, tables)
    every = evaluator.problem.choices
    states = _states(evaluator, offered)
    tables = {
        key: table[np.ix_(np.arange(len(table)), *(states[n] for n in key))]
        for key, table in tables.items()
    }
    model = _Model([len(s) for s in states], tables, evaluator.limits - constant[:-1])
    result = milp(
        -model.worth,
        constraints=[*model.constraints(), *_blocks(evaluator, model)],
        bounds=Bounds(0, 1),
        integrality=model.integrality,
        options={"time_limit": seconds, "mip_rel_gap": _GAP},
    )
    bound = np.inf if result.mip_dual_bound is None else constant[-1] - result.mip_dual_bound
    exact &= all(len(o) == len(c.options) for o, c in zip(offered, every, strict=True))
    if result.x is None:
        return Solved(None, evaluator.kept.copy(), float(bound), exact)
    taken = [int(np.argmax(part)) for part in np.split(result.x, model.starts[1:])[: len(states)]]
    picks = [
        int(options[state]) if state < len(options) else int(now)
        for options, state, now in zip(offered, taken, evaluator.chosen, strict=False)
    ]
    kept = np.array(taken[len(offered) :], dtype=bool)
    return Solved(np.array(picks, dtype=np.int64), kept, float(bound), exact)


def _states(evaluator: Evaluator, offered: list[Ints]) -> list[Ints]:
    """Which of the states in the tables are offered, for every choice and every block."""
    found = []
    for choice, owners, options in zip(
        evaluator.problem.choices, evaluator.owners, offered, strict=True
    ):
        found.append(np.append(options, len(choice.options)) if owners else options)
    return found + [np.arange(2, dtype=np.int64) for _ in evaluator.problem.blocks]


def _tables(evaluator: Evaluator) -> tuple[dict[tuple[int, ...], Floats], Floats, bool]:
    """Sum operators and worth by what they involve; what involves nothing is constant.

    Returns:
        Tables, constant costs and worth (limits + 1,), whether no operator was approximated.
    """
    limits = len(evaluator.limits)
    constant = np.append(evaluator.constant, -sum(b.loss for b in evaluator.problem.blocks))
    tables: dict[tuple[int, ...], Floats] = {}
    exact = True
    for operator in range(len(evaluator.terms.cost)):
        involved = evaluator.involved(operator)
        if len(involved) > 2:
            exact = False
            parts = evaluator.spread(operator)
        else:
            parts = {involved: evaluator.table(operator, involved)}
        limit = int(evaluator.terms.limit[operator])
        blocks = np.flatnonzero(evaluator.terms.held[operator]).tolist()
        for choices, costs in parts.items():
            key, table = _with_blocks(evaluator, choices, costs, blocks)
            if key:
                tables.setdefault(key, np.zeros((limits + 1, *table.shape)))[limit] += table
            else:
                constant[limit] += float(table)
    for choices, worth, blocks in _worths(evaluator):
        key, table = _with_blocks(evaluator, choices, worth, blocks)
        tables.setdefault(key, np.zeros((limits + 1, *table.shape)))[limits] += table
    return tables, constant, exact


def _worths(evaluator: Evaluator) -> list[tuple[tuple[int, ...], Floats, list[int]]]:
    """What adds to the objective: the choices it depends on, a table, the blocks it goes with."""
    found: list[tuple[tuple[int, ...], Floats, list[int]]] = []
    for number, block in enumerate(evaluator.problem.blocks):
        found.append(((), np.array(block.loss), [number]))
        found += [((g,), evaluator.axes_of(g, number), [number]) for g in evaluator.members[number]]
    return found + [
        ((g,), evaluator.axes_of(g, -1), []) for g in range(len(evaluator.problem.choices))
    ]


def _with_blocks(
    evaluator: Evaluator, choices: tuple[int, ...], table: Floats, blocks: list[int]
) -> tuple[tuple[int, ...], Floats]:
    """A table over choices that is nothing where one of the blocks is out.

    A choice that is idle without one of the blocks tells by its own state whether that is out.
    """
    told = [evaluator.owners[g] for g in choices]
    for place, owners in enumerate(told):
        if owners:
            table = np.pad(table, [(0, int(d == place)) for d in range(table.ndim)])
    count = len(evaluator.problem.choices)
    untold = tuple(block for block in blocks if (block,) not in told)
    for _ in untold:
        table = np.stack([np.zeros_like(table), table], axis=-1)
    return (*choices, *(count + block for block in untold)), table


def _offered(evaluator: Evaluator, tables: Tables) -> list[Ints]:
    """Options to offer: all, or evenly thinned ones with the present option among them."""
    sizes = [len(c.options) for c in evaluator.problem.choices]
    most = max(sizes, default=0)
    while most > 4 and _pairs(tables, [min(size, most) for size in sizes]) > _PAIRS:
        most -= 1
    offered: list[Ints] = []
    for size, present in zip(sizes, evaluator.chosen, strict=True):
        spread = np.linspace(0, size - 1, min(size, most)).round().astype(np.int64)
        offered.append(np.unique(np.append(spread, present)))
    return offered


def _pairs(tables: Tables, sizes: list[int]) -> int:
    """Number of variables for what involves several choices or blocks."""
    states = [math.prod(sizes[n] if n < len(sizes) else 2 for n in key) for key in tables]
    return sum(number for key, number in zip(tables, states, strict=True) if len(key) > 1)


class _Model:
    """Variables and constraints in the solver's terms.

    Attributes:
        starts: int array, the first variable of every choice, of every block, and of what comes
            behind.
        worth: float array (variables,), the objective.
        integrality: float array (variables,), 1 where only whole numbers are allowed.
    """

    def __init__(self, sizes: list[int], tables: Tables, room: Floats) -> None:
        self._sizes, self._tables, self._room = sizes, tables, room
        self.starts = np.cumsum([0, *sizes])
        self._singles = int(self.starts[-1])
        self._places: dict[tuple[int, ...], int] = {}
        self._variables = self._singles
        for key, table in tables.items():
            if len(key) == 1:
                self._places[key] = int(self.starts[key[0]])
            else:
                self._places[key] = self._variables
                self._variables += table[0].size
        every = self._flat()
        self.worth, self._costs = every[-1], every[:-1]
        self.integrality = np.zeros(self._variables)
        self.integrality[: self._singles] = 1

    def rows(
        self, entries: list[list[tuple[int, float]]], low: list[float], high: list[float]
    ) -> LinearConstraint:
        """Constraints, each from its variables and their factors, and its ends."""
        found = [(row, v, f) for row, entry in enumerate(entries) for v, f in entry]
        numbers, variables, factors = zip(*found, strict=True)
        shape = (len(entries), self._variables)
        return LinearConstraint(
            coo_array((factors, (numbers, variables)), shape=shape).tocsr(), low, high
        )

    def constraints(self) -> list[LinearConstraint]:
        """Costs within limits; one state per choice and block; pairs agree with their choices."""
        scale = np.maximum(np.abs(self._room), 1e-12)
        limits = LinearConstraint(self._costs / scale[:, None], -np.inf, self._room / scale)
        entries: list[list[tuple[int, float]]] = [
            [(v, 1.0) for v in range(start, start + size)]
            for start, size in zip(self.starts.tolist(), self._sizes, strict=False)
        ]
        wanted = [1.0] * len(entries)
        for key in self._tables:
            if len(key) > 1:
                entries += self._marginals(key)
        wanted += [0.0] * (len(entries) - len(wanted))
        return [limits, self.rows(entries, wanted, wanted)]

    def _marginals(self, key: tuple[int, ...]) -> list[list[tuple[int, float]]]:
        """For every state of everything involved: the sum over the others is its variable."""
        shape = tuple(self._sizes[n] for n in key)
        place = self._places[key] + np.arange(math.prod(shape)).reshape(shape)
        found = []
        for dim, number in enumerate(key):
            for state in range(shape[dim]):
                line = [(v, 1.0) for v in place.take(state, axis=dim).reshape(-1).tolist()]
                found.append([*line, (int(self.starts[number]) + state, -1.0)])
        return found

    def _flat(self) -> Floats:
        """All tables side by side, float array (limits + 1, variables)."""
        found = np.zeros((len(self._room) + 1, self._variables))
        for key, table in self._tables.items():
            flat = table.reshape(len(table), -1)
            found[:, self._places[key] : self._places[key] + flat.shape[1]] += flat
        return found


def _blocks(evaluator: Evaluator, model: _Model) -> list[LinearConstraint]:
    """Choices are out if and only if all their blocks are; enough blocks are out."""
    count = len(evaluator.problem.choices)
    out = [int(model.starts[count + b]) for b in range(len(evaluator.problem.blocks))]
    if not out:
        return []
    entries = [[(block, -1.0) for block in out]]
    high = [-float(evaluator.problem.least_removed)]
    for g, owners in enumerate(evaluator.owners):
        last = int(model.starts[g + 1]) - 1
        for block in owners:
            entries.append([(last, 1.0), (out[block], -1.0)])
            high.append(0.0)
        if owners:
            entries.append([(last, -1.0), *((out[block], 1.0) for block in owners)])
            high.append(len(owners) - 1.0)
    return [model.rows(entries, [-np.inf] * len(high), high)]
