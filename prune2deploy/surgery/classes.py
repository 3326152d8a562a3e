"""Freeze what a model's own code cannot follow, so that pruned copies keep its class.

In: a module and its graph. Out: the graph in which no axis may lose channels, and no block may go,
without which a copy has to be captured. Which ones these are is found by trying: where copies with
narrower widths of a set of axes run as planned with the model's own code, the set is free; else
either half of it is tried, beside what is free already. Of n axes of which k cannot follow, about
k log2(n) sets are tried.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from prune2deploy.graph.axes import Graph
from prune2deploy.graph.keep import freeze, keep
from prune2deploy.graph.trace import trace
from prune2deploy.plan.choices import allowed, decided_together, grid
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.slicing import keeps_class

HELD = "the model's code holds its width"
_APART = 4  # neighbours of which any two are tried with one of them whole
_LEAST = 0.25  # of an axis

Unit = tuple[str, ...]


def traced(
    model: nn.Module, example_inputs: Any, kept: Sequence[str], *, same_class: bool
) -> Graph:
    """The graph of a model in which all is frozen that is to stay.

    Args:
        model: Any module.
        example_inputs: As ``graph.trace`` takes them.
        kept: Names or patterns of layers; see ``graph.keep``.
        same_class: Whether pruned copies are to be of the model's class.
    """
    graph = keep(trace(model, example_inputs), kept)
    return keep_class(model, graph, example_inputs) if same_class else graph


def keep_class(model: nn.Module, graph: Graph, example_inputs: Any = None) -> Graph:
    """The graph whose prunable axes and blocks a pruned copy follows with the model's own code.

    Args:
        model: The module that ``graph`` was traced from.
        graph: Its graph.
        example_inputs: Inputs to try copies with; those of the trace by default.
    """
    units = decided_together(graph)
    draws = _drawn(graph, units)

    def runs(plan: Plan) -> bool:
        return keeps_class(model, graph, plan, example_inputs)

    def follows(tried: Sequence[Unit]) -> bool:
        names = [name for unit in tried for name in unit]
        return all(runs(Plan({n: kept[n] for n in names if n in kept})) for kept in draws)

    free = set(_free(units, [], follows))
    held = {name for unit in units if unit not in free for name in unit}
    blocks = tuple(block for block in graph.blocks if runs(Plan({}, (block.name,))))
    return freeze(replace(graph, blocks=blocks, _by_name={}), held, HELD)


def _drawn(graph: Graph, units: Sequence[Unit]) -> list[dict[str, tuple[int, ...]]]:
    """Kept channels to try: of all axes that can have fewer, twice, and of some beside others.

    Axes that the code takes for one are seen to differ where one of them is whole.
    """
    parts = [units, units]
    for span in (1, _APART // 2):
        sides = [place // span % 2 for place in range(len(units))]
        parts += [[u for u, at in zip(units, sides, strict=True) if at == side] for side in (0, 1)]
    return [_narrower(graph, part, seed) for seed, part in enumerate(parts)]


def _narrower(graph: Graph, units: Sequence[Unit], seed: int) -> dict[str, tuple[int, ...]]:
    """Kept channels of every axis of some that can have fewer than it has."""
    rng, steps = np.random.default_rng(seed), grid(graph, 1)
    kept = {}
    for unit in units:
        size, step = graph[unit[0]].size, math.lcm(*(steps[name] for name in unit))
        narrower = allowed(size, step, math.ceil(_LEAST * size), size)[:-1]
        if narrower.size:
            kept.update(dict.fromkeys(unit, tuple(range(int(rng.choice(narrower))))))
    return kept


def _free(
    units: list[Unit], beside: list[Unit], follows: Callable[[Sequence[Unit]], bool]
) -> list[Unit]:
    """Those of some units that may be narrower together, and beside others that are free."""
    if not units or follows([*beside, *units]):
        return units
    if len(units) == 1:
        return []
    middle = len(units) // 2
    first = _free(units[:middle], beside, follows)
    return first + _free(units[middle:], beside + first, follows)
