"""Cost of changing one choice, for all its options at once: the inner loop of every allocator.

In: a problem. Out: an evaluator that holds a current assignment and answers what latency (and
parameters and multiply-accumulates, where capped) would be for every option of one choice, or
without one block. An operator's work is a polynomial of widths, so only the terms that contain the
choice are computed again; a question takes some tens of microseconds.

The time of an operator is known at the present widths whether it is there or not; while one of
its blocks is out it weighs nothing. A choice all of whose axes went with blocks is *idle*: it has
an option still, which counts when a block comes back, but costs nothing and is worth nothing. Of
a tie that has lost some of its axes only the others are worth something.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from prune2deploy.plan.choices import Floats, Ints, Problem
from prune2deploy.plan.latency_model import in_blocks, time_ns
from prune2deploy.plan.terms import Flags, collect


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
    """A current assignment of options to choices, and of blocks that are kept, with its costs.

    Attributes:
        problem: What is being allocated.
        limits: float array: the budget of the operators in milliseconds, then the caps.
        constant: float array, the cost against each limit that neither choice nor block changes.
        owners: For every choice the numbers of the blocks that take its axes with them; it is
            idle while all of them are out. None where an axis stays in any case.
        members: For every block the numbers of the choices that it takes axes of.
        chosen: int array, the option that each choice takes at present.
        kept: bool array, whether each block is there at present.
        totals: float array, the present cost against each limit.
        worths: For every choice the worth of its options with these blocks, float array (options,).
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        model = problem.model
        self.limits, self.terms, self.constant = collect(problem)
        self._values = [
            np.array([c.options, in_blocks(c.options, model.multiple)], dtype=np.float64)
            for c in problem.choices
        ]
        self._locals = [self._local(g) for g in range(len(problem.choices))]
        self._blocks = _blocks_of_axes(problem)
        self.members = [
            tuple(g for g, blocks in enumerate(self._blocks) if block in blocks)
            for block in range(len(problem.blocks))
        ]
        self.owners = [
            tuple(np.unique(blocks).tolist()) if (blocks >= 0).all() else ()
            for blocks in self._blocks
        ]
        self.chosen = np.zeros(0, dtype=np.int64)
        self.kept = np.zeros(0, dtype=bool)
        self.totals = np.zeros(0)
        self.assign([len(c.options) - 1 for c in problem.choices])

    def assign(self, chosen: Sequence[int] | Ints, kept: Flags | None = None) -> None:
        """Take an option for every choice, and keep the blocks of ``kept`` (all by default)."""
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
        self._keep(np.ones(len(self.problem.blocks), dtype=bool) if kept is None else kept.copy())

    def costs(self, choice: int, *, whole: bool = False) -> Floats:
        """Cost against each limit for every option of one choice, float array (limits, options).

        With ``whole``, all operators that depend on the choice count as if no block were out:
        what tells the options of an idle choice apart.
        """
        local = self._locals[choice]
        times = self._times(local.operators, self._new_work(choice))
        change = times - self._time[local.operators][:, None]
        if self._lacking and not whole:
            change *= self._weight[local.operators][:, None]
        found = np.repeat(self.totals[:, None], times.shape[1], axis=1)
        np.add.at(found, self.terms.limit[local.operators], change)
        return found

    def set(self, choice: int, option: int) -> None:
        """Give one choice another option."""
        local = self._locals[choice]
        work = self._new_work(choice)[:, :, option]
        times = self._times(local.operators, work[:, :, None])[:, 0]
        change = (times - self._time[local.operators]) * self._weight[local.operators]
        np.add.at(self.totals, self.terms.limit[local.operators], change)
        self._time[local.operators] = times
        self._work[local.rows] = work
        own = local.power[:, option] / local.power[:, self.chosen[choice]]
        self._monomial[local.terms] *= own
        self.chosen[choice] = option

    def flip(self, block: int) -> None:
        """Take a block out, or bring it back with the widths that its choices have."""
        kept = self.kept.copy()
        kept[block] = not kept[block]
        self._keep(kept)

    def flipped(self, block: int) -> tuple[float, Floats]:
        """What :meth:`flip` would add to the objective and to the cost against each limit."""
        kept = self.kept.copy()
        kept[block] = not kept[block]
        mine = np.flatnonzero(self.terms.held[:, block])
        change = self._weights(kept, mine) - self._weight[mine]
        costs = np.zeros(len(self.limits))
        np.add.at(costs, self.terms.limit[mine], change * self._time[mine])
        worth = self.problem.blocks[block].loss * (1.0 if kept[block] else -1.0)
        for g in self.members[block]:
            option = int(self.chosen[g])
            worth += float(self._worth_with(kept, g)[option] - self.worths[g][option])
        return worth, costs

    def idle(self, choice: int) -> bool:
        """Whether all axes of a choice have gone with blocks."""
        owners = self.owners[choice]
        return self._lacking and bool(owners) and not self.kept[list(owners)].any()

    @property
    def worth(self) -> float:
        """The objective at present."""
        lost = sum(
            b.loss for b, kept in zip(self.problem.blocks, self.kept, strict=True) if not kept
        )
        return float(sum(w[o] for w, o in zip(self.worths, self.chosen, strict=True)) - lost)

    @property
    def spare(self) -> int:
        """How many more blocks are out than have to be; negative where too few are."""
        return int(np.count_nonzero(~self.kept)) - self.problem.least_removed

    def feasible(self) -> bool:
        """Whether the present costs keep every limit, and enough blocks are out."""
        return self.spare >= 0 and bool((self.totals <= self.limits + 1e-9).all())

    def _keep(self, kept: Flags) -> None:
        """Keep these blocks, at the present widths."""
        self.kept = kept
        self._lacking = not kept.all()
        every: Ints = np.arange(len(self._time), dtype=np.int64)
        self._weight = self._weights(kept, every)
        spent = np.bincount(self.terms.limit, self._time * self._weight, len(self.limits))
        self.totals = self.constant + spent
        self.worths = [choice.worth for choice in self.problem.choices]
        for g in {g for b in np.flatnonzero(~kept) for g in self.members[b]}:
            self.worths[g] = self._worth_with(kept, g)

    def _weights(self, kept: Flags, operators: Ints) -> Floats:
        """One for operators that are there with these blocks, zero for those that are not."""
        gone = (self.terms.held[operators] & ~kept).any(axis=1)
        return np.asarray(~gone, dtype=np.float64)

    def _worth_with(self, kept: Flags, choice: int) -> Floats:
        """Worth of the options of a choice with these blocks."""
        one, blocks = self.problem.choices[choice], self._blocks[choice]
        there = np.append(kept, True)[blocks]  # -1, an axis without a block, finds the last
        return one.worth if there.all() else np.asarray(one.by_axis[there].sum(axis=0))

    def axes_of(self, choice: int, block: int) -> Floats:
        """What the axes of a choice that go with a block (-1: with none) add, float (options,)."""
        with_it = self._blocks[choice] == block
        return np.asarray(self.problem.choices[choice].by_axis[with_it].sum(axis=0))

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
            if variable >= 2 * count:  # the constant one
                continue
            kind, choice = divmod(int(variable), count)
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


def _blocks_of_axes(problem: Problem) -> list[Ints]:
    """For every choice the block that takes each of its axes with it, -1 where none does."""
    where = {axis: b for b, block in enumerate(problem.blocks) for axis in block.axes}
    return [
        np.array([where.get(axis, -1) for axis in choice.axes], dtype=np.int64)
        for choice in problem.choices
    ]
