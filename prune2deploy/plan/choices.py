"""What an allocator chooses between: the widths that every axis may take, and their worth.

In: a graph and, per axis, a curve of worth over kept channels (retained importance, or minus the
measured loss). Out: one choice per free axis or tie of axes, on the grid of widths that the
device runs well at. The full width is always allowed; frozen axes offer no choice. A problem may
also offer blocks to take out whole: their axes and operators go with them.

Three sources of worth serve three situations: measured losses (``sensitivity``) where there is
data and no training follows; ``importance_curves`` where there is no data; ``trained_curves``
where the pruned model will be trained.

Without data, what a width is worth has to come from scores alone, and their plain sum misleads: an
axis whose scores are small beside the others' (or whose every channel costs much time) would be
cut to the bone while the rest stays whole, although a network is no better than its narrowest
layer. The objective is therefore one with diminishing returns. The share of a layer's weight that
survives is the share of its inputs times that of its outputs; what is maximised is the product of
those shares over all layers, i.e. the sum over axes of the logarithm of the retained share, each
axis counted as often as layers read or write it. Every axis gets dearer as it gets narrower, so
none is starved for another's sake. The logarithm is bent at the low end (``log(1 + 99 share)``)
so that it is zero, not minus infinity, where nothing is kept; above a tenth both differ by a
constant only.

Training moves the goal. What the model loses at once is mostly restored; what is not restored is
what a layer that became a bottleneck can no longer carry. Losses measured before training, and
counting an axis by the layers it touches, both spare the stream that many layers share and pay
for it with hollow blocks, which train back worst. ``trained_curves`` counts every axis once, with
a worth that saturates early: ``share / (share + 1/50)``. Halving an axis costs twice as much at
each halving, as ``-1 / share`` would, but a whole axis stays worth a finite amount.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import PlanError
from prune2deploy.graph.axes import Axis, Graph
from prune2deploy.plan.latency_model import LatencyModel

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Choice:
    """One decision: how many channels an axis, or each axis of a tie, keeps.

    Attributes:
        axes: The axes decided together.
        size: Their full width.
        options: int array, the widths allowed, ascending; the last is ``size``.
        by_axis: float array (axes, options), what each axis adds to the objective.
    """

    axes: tuple[str, ...]
    size: int
    options: Ints
    by_axis: Floats

    @cached_property
    def worth(self) -> Floats:
        """Float array (options,), of all its axes together; more is better."""
        return np.asarray(self.by_axis.sum(axis=0), dtype=np.float64)

    def among(self, allowed: npt.NDArray[np.bool_]) -> Choice:
        """The same decision with some of its options only; ``allowed`` has one flag for each."""
        return replace(self, options=self.options[allowed], by_axis=self.by_axis[:, allowed])


@dataclass(frozen=True)
class Removal:
    """A block that may be taken out whole.

    Attributes:
        name: Of the block in the graph.
        loss: What the objective loses with it, beside the worth of its axes.
        axes: The axes that go with it; no other block has them.
        operators: Numbers of the operators of the latency model that go with it. An operator of
            several blocks goes with the first of them; one that depends on an axis which goes
            need not be named.
    """

    name: str
    loss: float
    axes: frozenset[str]
    operators: frozenset[int]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything an allocator needs to know.

    Attributes:
        graph: The traced model.
        model: Predicts latency from counts.
        choices: The decisions.
        budget_ms: Upper limit of the predicted latency.
        max_params: Upper limit of the number of parameters, if any.
        max_macs: Upper limit of the multiply-accumulates, if any.
        blocks: What may be taken out; none holds another. Flags of blocks are in this order:
            true where the block is kept.
        least_removed: How many of them have to go.
    """

    graph: Graph
    model: LatencyModel
    choices: tuple[Choice, ...]
    budget_ms: float
    max_params: int | None = None
    max_macs: int | None = None
    blocks: tuple[Removal, ...] = ()
    least_removed: int = 0

    def counts(self, chosen: Sequence[int], kept: Sequence[bool] | None = None) -> dict[str, int]:
        """Kept channels per axis when choice ``i`` takes its option ``chosen[i]``.

        Axes that went with a block are left out.
        """
        gone = self.gone(kept)
        return {
            axis: int(choice.options[option])
            for choice, option in zip(self.choices, chosen, strict=True)
            for axis in choice.axes
            if axis not in gone
        }

    def worth(self, chosen: Sequence[int], kept: Sequence[bool] | None = None) -> float:
        """The objective: summed worth of the options taken, less what removed blocks lose."""
        gone = self.gone(kept)
        total = -sum(block.loss for block in self.without(kept))
        for choice, option in zip(self.choices, chosen, strict=True):
            if gone.isdisjoint(choice.axes):
                total += float(choice.worth[option])
            else:
                left = [axis not in gone for axis in choice.axes]
                total += float(choice.by_axis[left, option].sum())
        return total

    def predict(self, chosen: Sequence[int], kept: Sequence[bool] | None = None) -> float:
        """Predicted latency in milliseconds, offset included."""
        out = self.without(kept)
        left_out = {
            number
            for number, operator in enumerate(self.model.operators)
            if any(number in block.operators or operator.axes & block.axes for block in out)
        }
        model = self.model.without(left_out) if out else self.model
        return model.predict(self.counts(chosen, kept))

    def without(self, kept: Sequence[bool] | None) -> tuple[Removal, ...]:
        """The blocks that are taken out; ``None`` keeps all."""
        flags = [True] * len(self.blocks) if kept is None else kept
        return tuple(b for b, stays in zip(self.blocks, flags, strict=True) if not stays)

    def gone(self, kept: Sequence[bool] | None) -> frozenset[str]:
        """The axes that go with the blocks that are taken out."""
        return frozenset().union(*(block.axes for block in self.without(kept)))

    @property
    def ends(self) -> tuple[float, float]:
        """Worth of the narrowest widths, and of the full ones; every block kept."""
        most = self.worth([len(choice.options) - 1 for choice in self.choices])
        return self.worth([0] * len(self.choices)), most


def grid(graph: Graph, multiple: int) -> dict[str, int]:
    """Step of every axis so that the widths it takes part in are multiples of ``multiple``.

    In a product of axes (heads times channels per head, groups times channels per group) the
    widest carries the multiple and the others are free.
    """
    steps = {axis.name: 1 for axis in graph.axes}
    sizes = {axis.name: axis.size for axis in graph.axes}
    products = _products(graph)
    widest = {axes: max(axes, key=lambda name: (sizes[name], name)) for _, axes in products if axes}
    free = {name for axes, wide in widest.items() for name in axes if name != wide}
    for coefficient, axes in products:
        if axes and widest[axes] not in free:
            need = multiple // math.gcd(multiple, abs(coefficient))
            steps[widest[axes]] = math.lcm(steps[widest[axes]], need)
    return steps


def _products(graph: Graph) -> list[tuple[int, tuple[str, ...]]]:
    """Coefficient and axes of every term of the widths that layers read, write or hand on."""
    sides = [w for layer in graph.layers for w in (layer.in_width, layer.out_width)]
    return [term for width in dict.fromkeys([*graph.widths, *sides]) for term in width.terms]


def floors(graph: Graph, steps: Mapping[str, int], least: float) -> dict[str, float]:
    """Fraction of its channels that every prunable axis keeps, so that every width keeps ``least``.

    The axes of a product (heads times channels per head) share what may go: the narrowest takes
    an equal part of it, and what its steps leave of that is for the others.

    Args:
        graph: The traced model.
        steps: Step of every axis, from ``grid``.
        least: Smallest fraction of its channels that any layer keeps.
    """
    sizes = {axis.name: axis.size for axis in graph.prunable}
    found = dict.fromkeys(sizes, least)
    for _, axes in _products(graph):
        mine = sorted((name for name in axes if name in sizes), key=lambda name: sizes[name])
        left = least
        for place, name in enumerate(mine):
            found[name] = max(found[name], left ** (1 / (len(mine) - place)))
            narrowest = allowed(sizes[name], steps[name], _least(found[name], sizes[name]), 2)[0]
            left = min(1.0, left * sizes[name] / int(narrowest))
    return found


def _least(fraction: float, size: int) -> int:
    """The fewest channels that are at least a fraction of ``size``."""
    return max(1, math.ceil(fraction * size - 1e-9))


def allowed(size: int, step: int, least: int, limit: int) -> Ints:
    """Widths an axis may take: multiples of ``step`` from ``least`` up, and ``size`` itself.

    At most ``limit`` of them, evenly spread, where the grid is finer than that.
    """
    start = max(step, -(-least // step) * step)
    inner = np.arange(start, size, step, dtype=np.int64)
    if len(inner) >= limit:
        inner = inner[np.unique(np.linspace(0, len(inner) - 1, limit - 1).round().astype(int))]
    return np.append(inner, np.int64(size))


def leaving_choice(graph: Graph, multiple: int) -> int:
    """``multiple``, halved until the narrowest widths on its grid save enough work.

    Enough is half of the multiply-accumulates that the narrowest widths off any grid would save. A
    step that only layers of little work can follow would put most budgets out of reach.
    """
    most = _saved(graph, 1)
    while multiple > 1 and _saved(graph, multiple) < _REACH * most:
        multiple //= 2
    return multiple


_REACH = 0.5  # of the multiply-accumulates that widths of any number save


def _saved(graph: Graph, multiple: int) -> int:
    """Multiply-accumulates that the narrowest widths on the grid of ``multiple`` save."""
    steps = grid(graph, multiple)
    least = {a.name: int(allowed(a.size, steps[a.name], 1, 2)[0]) for a in graph.prunable}
    return graph.macs() - graph.macs(least)


_BEND = 99.0  # log(1 + _BEND * share): straight below a share of 1 / _BEND, logarithmic above


def importance_curves(graph: Graph, scores: Mapping[str, npt.ArrayLike]) -> dict[str, Floats]:
    """Worth of every prunable axis by number of kept channels, from scores alone.

    Args:
        graph: The traced model.
        scores: Axis name to one score per channel, higher is kept; only their proportions within
            an axis count.

    Returns:
        Axis name to float array (size + 1,), rising from 0: entry k is the bent logarithm of the
        share of the axis' scores that its k best channels hold, weighted by the number of layers
        that read or write the axis; the last entries of all axes add up to 1.

    Raises:
        PlanError: Scores are missing, of the wrong length, or not finite.
    """
    checked = {axis.name: _scores(axis.name, axis.size, scores) for axis in graph.prunable}
    layers = {axis.name: _layers(axis) for axis in graph.prunable}
    whole = sum(layers.values()) * math.log1p(_BEND)
    return {
        name: layers[name] * np.log1p(_BEND * _shares(one)) / whole for name, one in checked.items()
    }


_KNEE = 0.02  # share at which an axis has half its worth where training follows


def trained_curves(graph: Graph, scores: Mapping[str, npt.ArrayLike]) -> dict[str, Floats]:
    """Worth of every prunable axis by number of kept channels, where training follows.

    Chosen among 20 objectives (powers of the share, with and without scores, weights by layers
    and measured losses) by accuracy after training; ``docs/benchmarks.md`` has the figures.

    Args:
        graph: The traced model.
        scores: Axis name to one score per channel, higher is kept; only their proportions within
            an axis count.

    Returns:
        Axis name to float array (size + 1,), rising from 0 and concave; the last entries of all
        axes are equal and add up to 1.

    Raises:
        PlanError: Scores are missing, of the wrong length, or not finite.
    """
    shares = {axis.name: _shares(_scores(axis.name, axis.size, scores)) for axis in graph.prunable}
    scale = (1 + _KNEE) / max(1, len(shares))
    return {name: scale * share / (share + _KNEE) for name, share in shares.items()}


def _layers(axis: Axis) -> int:
    """How many layers read or write an axis."""
    return max(1, len({(m.tensor, m.dim) for m in axis.members if m.role != "param"}))


def _shares(scores: Floats) -> Floats:
    """Share of the k best scores among all, for k = 0..size; equal shares where all are zero."""
    if not scores.any():
        scores = np.ones_like(scores)
    found = np.concatenate([[0.0], np.cumsum(np.sort(scores)[::-1])])
    return np.asarray(found / found[-1], dtype=np.float64)


def _scores(name: str, size: int, scores: Mapping[str, npt.ArrayLike]) -> Floats:
    if name not in scores:
        raise PlanError(f"no scores for axis {name!r}; every prunable axis needs {size} of them")
    found = np.asarray(scores[name], dtype=np.float64)
    if found.shape != (size,):
        raise PlanError(f"scores of axis {name!r} have shape {found.shape}, expected ({size},)")
    if not np.isfinite(found).all():
        bad = int(np.count_nonzero(~np.isfinite(found)))
        raise PlanError(f"{bad} of {size} scores of axis {name!r} are not finite; check the data")
    return found - min(0.0, float(found.min()))


def decided_together(graph: Graph) -> list[tuple[str, ...]]:
    """Names of the prunable axes: those of each tie, then every other one by itself."""
    tied = {name for tie in graph.ties for name in tie}
    return [*graph.ties, *((axis.name,) for axis in graph.prunable if axis.name not in tied)]


def choices(
    graph: Graph,
    curves: Mapping[str, Floats],
    *,
    multiple: int,
    least: float = 0.0,
    limit: int = 32,
) -> tuple[Choice, ...]:
    """The decisions of a model: one per tie and one per free axis.

    Args:
        graph: The traced model.
        curves: Axis name to worth by number of kept channels, float array (size + 1,).
        multiple: Channel multiple of the target.
        least: Smallest fraction of its channels that a layer may keep.
        limit: Most options of one choice.
    """
    steps = grid(graph, multiple)
    shares = floors(graph, steps, least)
    found = []
    for axes in decided_together(graph):
        size = graph[axes[0]].size
        if any(graph[name].size != size for name in axes):
            raise PlanError(f"tied axes must have equal sizes, found {axes}")
        step = math.lcm(*(steps[name] for name in axes))
        options = allowed(size, step, _least(max(shares[name] for name in axes), size), limit)
        if len(options) > 1:
            by_axis = np.array([curves[name][options] for name in axes])
            found.append(Choice(axes, size, options, by_axis))
    return tuple(found)
