"""Decides which blocks to take out where no widths are narrow enough.

In: the allocation problem of the whole model, and what the objective loses with every block. Out:
names of blocks to take out: those that the best plan lacks, blocks and widths chosen together by
the exact method. Plain arithmetic on predictions.

What a block saves is the time of the operators that depend on an axis which goes with it, and of
what follows the last of them element by element (the addition to the shortcut, an activation).
The widths of the best plan stay on the grid of the whole model; what is left is allocated anew
by the latency model of the whole one less those operators, which needs no probes of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import replace

from prune2deploy.graph.axes import Block, Counts, Graph
from prune2deploy.plan.allocate import SmallestMisses, allocate
from prune2deploy.plan.choices import Problem, Removal
from prune2deploy.plan.latency_model import LatencyModel, OperatorModel

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


def operators(graph: Graph, model: LatencyModel, block: str) -> frozenset[int]:
    """Numbers of the operators of the engine that go with a block."""
    axes = gone(graph, block)
    own = [i for i, operator in enumerate(model.operators) if operator.axes & axes]
    if not own:
        return frozenset()
    behind = range(own[-1] + 1, len(model.operators))
    tail = itertools.takewhile(lambda i: _elementwise(model.operators[i], model.sizes), behind)
    return frozenset((*own, *tail))


def saved(graph: Graph, model: LatencyModel, counts: Counts) -> dict[str, float]:
    """Predicted milliseconds that each removable block takes at ``counts``."""
    times = model.predict_operators(counts)
    return {
        block.name: sum(times[i] for i in operators(graph, model, block.name))
        for block in removable(graph)
    }


def shortened(graph: Graph, model: LatencyModel, blocks: Collection[str]) -> LatencyModel:
    """What ``model`` says of the graph without ``blocks``."""
    return model.without({i for block in blocks for i in operators(graph, model, block)})


def _elementwise(operator: OperatorModel, sizes: Counts) -> bool:
    """Whether an operator makes as many elements as each of its one or two inputs has."""
    work = operator.work
    made = work.written(sizes)
    return bool(work.axes) and not work.macs.axes and work.read(sizes) in (made, 2 * made)


def removals(problem: Problem, losses: Mapping[str, float]) -> tuple[Removal, ...]:
    """The blocks that may go, as an allocator takes them: those that save time.

    Args:
        problem: Of the whole model.
        losses: What the objective loses with each block, beside the worth of its axes.
    """
    graph, model = problem.graph, problem.model
    return tuple(
        Removal(name, losses[name], gone(graph, name), operators(graph, model, name))
        for name, ms in saved(graph, model, {}).items()
        if ms > 0
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
        Names of blocks; all that save time where even without them the budget is predicted to be
        missed.
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
    except SmallestMisses:
        return names
