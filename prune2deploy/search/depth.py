"""Which blocks go where no width is narrow enough.

In: the allocation problem of the whole model, and what every block is worth. Out: names of blocks
to take out. They are ordered by least worth per predicted millisecond; as many of them go as leave
the worthiest plan for the rest. Plain arithmetic on predictions.

What a block saves is the time of the operators that depend on an axis which goes with it, and of
what follows the last of them element by element (the addition to the shortcut, an activation).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from prune2deploy.graph.axes import Block, Counts, Graph
from prune2deploy.plan.allocate import SmallestMisses, allocate
from prune2deploy.plan.choices import Choice, Problem
from prune2deploy.plan.latency_model import LatencyModel, OperatorModel


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


def _elementwise(operator: OperatorModel, sizes: Counts) -> bool:
    """Whether an operator makes as many elements as each of its one or two inputs has."""
    work = operator.work
    made = work.written(sizes)
    return bool(work.axes) and not work.macs.axes and work.read(sizes) in (made, 2 * made)


def ordered(saves: Mapping[str, float], worth: Mapping[str, float]) -> tuple[str, ...]:
    """Blocks by worth per millisecond saved, the least first; without those that save nothing."""
    able = [name for name, ms in saves.items() if ms > 0]
    return tuple(sorted(able, key=lambda name: (worth[name] / saves[name], name)))


def choose(
    problem: Problem,
    order: Sequence[str],
    losses: Mapping[str, float],
    offer: Callable[[Graph], tuple[Choice, ...]],
) -> tuple[str, ...]:
    """How many blocks to take out: as many as leave the worthiest plan for the rest.

    Args:
        problem: Of the whole model.
        order: Blocks in the order in which they go.
        losses: What the objective loses with each block beside the worth of its axes.
        offer: The choices of what is left.

    Returns:
        The first blocks of ``order``; all of them where even that is predicted to miss.
    """
    best: tuple[float, int] | None = None
    for many in range(1, len(order) + 1):
        value = _value(problem, order[:many], offer)
        if value is None:
            continue
        value -= sum(losses[name] for name in order[:many])
        if best is not None and value <= best[0]:
            break
        best = (value, many)
    return tuple(order[: best[1] if best else len(order)])


def _value(
    problem: Problem, removed: Sequence[str], offer: Callable[[Graph], tuple[Choice, ...]]
) -> float | None:
    """Objective of the best plan for what is left; ``None`` where all miss the budget."""
    graph, model = problem.graph, problem.model
    left = graph.without(removed)
    out = frozenset().union(*(operators(graph, model, name) for name in removed))
    kept = tuple(operator for i, operator in enumerate(model.operators) if i not in out)
    small = replace(problem, graph=left, model=replace(model, operators=kept), choices=offer(left))
    if not small.choices:
        return 0.0 if small.model.predict({}) <= problem.budget_ms else None
    if small.model.operator_budget_ms(problem.budget_ms) <= 0:
        return None
    try:
        return allocate(small).objective
    except SmallestMisses:
        return None
