"""Decides which blocks to take out where no widths are narrow enough.

In: the allocation problem of the whole model, and what the objective loses with every block. Out:
names of blocks to take out: those that the best plan lacks, blocks and widths chosen together by
the exact method. Plain arithmetic on predictions.

What a block saves is the time of the operators that depend on an axis which goes with it, and of
what lies between these and before the next block (normalisation, reshaping, the addition to the
shortcut): engines run a block at a stretch.
The widths of the best plan stay on the grid of the whole model; what is left is allocated anew
by the latency model of the whole one less those operators, which needs no probes of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from prune2deploy.graph.axes import Block, Graph, Polynomial
from prune2deploy.plan.allocate import CapTooTightError, SmallestMisses, allocate
from prune2deploy.plan.choices import Problem, Removal
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.plan.work import contracts

SECONDS = 20.0  # time limit of the exact method, which never returns less than it starts from


def removable(graph: Graph) -> tuple[Block, ...]:
    """Blocks that hold no other block: the finest steps there are."""
    names = [block.name for block in graph.blocks]
    return tuple(
        block
        for block in graph.blocks
        if not any(name.startswith(f"{block.name}.") for name in names)
    )


def gone(graph: Graph, block: str) -> frozenset[str]:
    """Names of the axes that go with a block."""
    left = {axis.name for axis in graph.without((block,)).axes}
    return frozenset(axis.name for axis in graph.axes if axis.name not in left)


def operators(graph: Graph, model: LatencyModel) -> dict[str, frozenset[int]]:
    """Numbers of the operators of the engine that go with each removable block."""
    axes = {block.name: gone(graph, block.name) for block in removable(graph)}
    every = frozenset().union(*axes.values())
    owned = [bool(operator.axes & every) for operator in model.operators]
    found = {}
    for name, mine in axes.items():
        own = [n for n, operator in enumerate(model.operators) if operator.axes & mine]
        behind = itertools.chain.from_iterable(_behind(model, owned, n) for n in own)
        found[name] = frozenset((*own, *behind))
    return found


def _behind(model: LatencyModel, owned: Sequence[bool], number: int) -> list[int]:
    """What goes with an operator of a block because it follows: up to the next one of any block.

    Where another layer comes first, it is what works element by element.
    """
    rest = range(number + 1, len(owned))
    layer = (n for n in rest if owned[n] or contracts(model.operators[n].kind))
    end = next(layer, len(owned))
    run = range(number + 1, end)
    if end < len(owned) and owned[end]:
        return list(run)
    return list(itertools.takewhile(lambda n: _elementwise(model, n), run))


def shortened(graph: Graph, model: LatencyModel, blocks: Collection[str]) -> LatencyModel:
    """What ``model`` says of the graph without ``blocks``."""
    found = operators(graph, model)
    return model.without({number for block in blocks for number in found[block]})


def _elementwise(model: LatencyModel, number: int) -> bool:
    """Whether an operator makes as many elements as each of its one or two inputs has."""
    work, sizes = model.operators[number].work, model.sizes
    varying = Polynomial(tuple(term for term in work.read.terms if term[1]))  # no shape, say
    made = work.written(sizes)
    return bool(work.axes) and varying(sizes) in (made, 2 * made)


def removals(problem: Problem, losses: Mapping[str, float]) -> tuple[Removal, ...]:
    """The blocks that may go, as an allocator takes them: those that save time.

    Args:
        problem: Of the whole model.
        losses: What the objective loses with each block, beside the worth of its axes.
    """
    graph, model = problem.graph, problem.model
    found, times = operators(graph, model), model.predict_operators({})
    return tuple(
        Removal(name, losses[name], gone(graph, name), numbers)
        for name, numbers in found.items()
        if any(times[number] > 0 for number in numbers)
    )


def choose(
    problem: Problem, losses: Mapping[str, float], *, seconds: float = SECONDS
) -> tuple[str, ...]:
    """Which blocks to take out: those that the best plan of the budget lacks, one at least.

    Widths are known not to reach the budget, whatever is predicted of them: hence the one.

    Args:
        problem: Of the whole model.
        losses: What the objective loses with each block, beside the worth of its axes. A block
            whose loss is not finite goes only where all do.
        seconds: Time limit of the exact method.

    Returns:
        Names of blocks; all that save time where even without those of finite loss the budget is
        predicted to be missed, or a cap is not kept.
    """
    every = removals(problem, losses)
    able = tuple(block for block in every if math.isfinite(block.loss))
    names = tuple(block.name for block in every)
    if not able or problem.model.operator_budget_ms(problem.budget_ms) <= 0:
        return names
    try:
        return allocate(
            replace(problem, blocks=able, least_removed=1), "milp", seconds=seconds
        ).removed
    except (SmallestMisses, CapTooTightError):
        return names
