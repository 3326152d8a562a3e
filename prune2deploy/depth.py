"""Which blocks go where no width is narrow enough.

In: the graph, a latency model, the narrowest counts, and what every block is worth. Out: names of
blocks to take out, least worth per predicted millisecond first. Plain arithmetic on predictions.

What a block saves is the time of the operators that depend on an axis which goes with it, and of
what follows the last of them element by element (the addition to the shortcut, an activation).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from prune2deploy.graph.axes import Block, Counts, Graph
from prune2deploy.plan.latency_model import LatencyModel, OperatorModel

ROOM = 0.7  # of the limit: the narrowest plan should be this far below, to have widths to choose


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


def saved(graph: Graph, model: LatencyModel, counts: Counts) -> dict[str, float]:
    """Predicted milliseconds that each block takes at ``counts``."""
    times = model.predict_operators(counts)
    found = {}
    for block in removable(graph):
        axes = gone(graph, block.name)
        own = [i for i, operator in enumerate(model.operators) if operator.axes & axes]
        last = max(own, default=-1)
        tail = itertools.takewhile(
            lambda i: _elementwise(model.operators[i], model.sizes),
            range(last + 1, len(times) if own else 0),
        )
        found[block.name] = sum(times[i] for i in {*own, *tail})
    return found


def _elementwise(operator: OperatorModel, sizes: Counts) -> bool:
    """Whether an operator makes as many elements as each of its one or two inputs has."""
    work = operator.work
    made = work.written(sizes)
    return bool(work.axes) and not work.macs.axes and work.read(sizes) in (made, 2 * made)


def choose(
    saves: Mapping[str, float], worth: Mapping[str, float], floor_ms: float, limit_ms: float
) -> tuple[str, ...]:
    """Blocks to take out so that the narrowest plan leaves room below the limit.

    Args:
        saves: Milliseconds that each block saves in the narrowest plan.
        worth: What each block is worth.
        floor_ms: Latency of the narrowest plan with all blocks.
        limit_ms: What the result may take.

    Returns:
        Names, all of them where even that is not enough.
    """
    taken: list[str] = []
    for name in sorted(saves, key=lambda n: (worth[n] / max(saves[n], 1e-12), n)):
        if floor_ms <= ROOM * limit_ms:
            break
        taken.append(name)
        floor_ms -= saves[name]
    return tuple(taken)
