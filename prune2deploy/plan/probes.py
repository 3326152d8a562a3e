"""Random aligned plans to learn a latency model from.

In: a graph and the channel multiple. Out: counts per axis, one mapping per probe. Widths are
drawn so that the probes together tell the axes of the model apart: the operators of an engine
are recognised by how their shapes vary from probe to probe (see ``identify``), and axes that
always shrink alike could not be distinguished.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np

from prune2deploy.graph.axes import Graph
from prune2deploy.plan.choices import allowed, decided_together, grid

_TRIES = 24
_LEAST = 0.25  # of an axis; narrower plans are rarely wanted and say little about wide ones
_OPTIONS = 64


def probes(
    graph: Graph, number: int, *, multiple: int, seed: int = 0
) -> tuple[dict[str, int], ...]:
    """Draw plans for probe builds; more of them begin with the same ones.

    Args:
        graph: The traced model.
        number: How many.
        multiple: Channel multiple of the target.
        seed: Of the random draw.

    Returns:
        Kept channels of every prunable axis, per probe.
    """
    rng = np.random.default_rng(seed)
    units, steps = decided_together(graph), grid(graph, multiple)
    options = [_options(graph, axes, steps) for axes in units]
    codes: list[tuple[int, ...]] = [(int(one[-1]),) for one in options]
    plans = []
    for _ in range(number):
        met: Counter[tuple[int, ...]] = Counter()
        plan = {}
        for place, (axes, widths) in enumerate(zip(units, options, strict=True)):
            tried = [(*codes[place], int(w)) for w in rng.choice(widths, _TRIES)]
            codes[place] = min(tried, key=lambda code: met[code])
            met[codes[place]] += 1
            width = codes[place][-1]
            plan.update(dict.fromkeys(axes, width))
        plans.append(plan)
    return tuple(plans)


def _options(
    graph: Graph, axes: tuple[str, ...], steps: dict[str, int]
) -> np.typing.NDArray[np.int64]:
    size = graph[axes[0]].size
    step = math.lcm(*(steps[name] for name in axes))
    return allowed(size, step, max(1, math.ceil(_LEAST * size)), _OPTIONS)
