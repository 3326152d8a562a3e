"""Predict the latency of a model from its widths, learnt from a handful of profiled builds.

In: the graph, and builds (baseline and probes) each with its kept counts and its per-operator
profile. Out: a model that adds up one predicted time per operator and one whole-model offset.

Every operator's work (multiply-accumulates, elements read and written, channels rounded up to
the device's block) is a formula of axis widths, found by ``identify``; its cost per unit of work
is fitted by ``costs``. What an operator took in the builds beyond its prediction is kept as a
residual that counts near the widths it was seen at, so a cell that was just measured overrides
its prediction. What profiling adds to each is taken off first (``overhead``). The offset (measured
minus sum of operators) is interpolated between the builds that were measured, partly constant and
partly in proportion, and renewed by each of them.

Runtimes without a profile get one cost per multiply-accumulate plus a fixed cost, fitted on
whole-model measurements; ``method`` then says ``"macs"``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import PlanError
from prune2deploy.graph.axes import Counts, Graph
from prune2deploy.plan.costs import Cost, Point, fit_costs
from prune2deploy.plan.identify import Identified, Identifier
from prune2deploy.plan.overhead import overhead_ns, without
from prune2deploy.plan.pairing import align
from prune2deploy.plan.work import NO_WORK, Work, is_convolution
from prune2deploy.timing import OperatorTiming
from prune2deploy.units import NS_PER_MS, ms

Array = npt.NDArray[np.float64]
Channels = TypeVar("Channels", int, npt.NDArray[np.int64])

_REACH = 0.3  # how far a residual reaches, in natural-log units of work
_DOUBT = 0.5  # weight of "no residual" against one build at the very widths
_NEAR = 0.15  # how far what is peculiar to one build's offset reaches, in log latency
_PECULIAR, _NOISE = 0.03, 0.01  # its size, and least error of a measurement, against the latency
_CONSTANT = 0.05  # size of what every call costs, against the latency of the unpruned model
_TINY = 1e-9


@dataclass(frozen=True)
class Build:
    """One built engine.

    Attributes:
        counts: Kept channels per axis; an axis that is absent keeps all.
        profile: Time per operator; empty when the runtime cannot tell.
        measured_ms: Whole-model latency, where it was measured.
        half_width: Half-width of its 95 % interval, as a fraction.
    """

    counts: Counts
    profile: tuple[OperatorTiming, ...] = ()
    measured_ms: float | None = None
    half_width: float = 0.0


class Anchor(NamedTuple):
    """What one measured build says of the offset.

    Attributes:
        operators_ms: Sum of its operators as predicted.
        offset_ms: Measured latency beyond that.
        noise: Standard error of the measurement, as a fraction of the unpruned model's latency.
    """

    operators_ms: float
    offset_ms: float
    noise: float


@dataclass(frozen=True, eq=False)
class OperatorModel:
    """Predicted time of one operator.

    Attributes:
        name: The runtime's name.
        kind: The runtime's operator type.
        signature: What it shares its cost with.
        work: Work as formulas of axis widths.
        cost: Nanoseconds per unit of work and per call.
        padded: Whether channels count in whole blocks.
        seen: float array (builds, 3), natural log of the work in each build.
        residual: float array (builds,), natural log of seen time over predicted time.
        share: Fraction of the builds that contain the operator (fusion may differ).
    """

    name: str
    kind: str
    signature: str
    work: Work
    cost: Cost
    padded: bool = False
    seen: Array = field(default_factory=lambda: np.zeros((0, 3)))
    residual: Array = field(default_factory=lambda: np.zeros(0))
    share: float = 1.0

    @property
    def axes(self) -> frozenset[str]:
        """Axes that its time depends on."""
        return self.work.axes

    def time_ns(self, work: Array) -> Array:
        """Nanoseconds that it takes for work in numbers, float array (..., 3)."""
        return time_ns(work, np.array(self.cost), self.seen, self.residual)

    def ns(self, sizes: Counts) -> float:
        """Nanoseconds that it takes at some axis sizes."""
        return float(self.time_ns(np.array(numbers(self.work, sizes))))


def time_ns(work: Array, cost: Array, seen: Array, residual: Array) -> Array:
    """Time of operators from their work.

    Args:
        work: float array (..., 3), work in numbers.
        cost: float array (..., 4), broadcast against ``work``.
        seen: float array (..., builds, 3), log work of the cells that were measured.
        residual: float array (..., builds); a cell that does not exist has NaN.

    Returns:
        Nanoseconds, float array (...,).
    """
    plain = np.einsum("...i,...i->...", work, cost[..., :3]) + cost[..., 3]
    if residual.shape[-1] == 0:
        return np.asarray(plain, dtype=np.float64)
    gap = np.log(np.maximum(work, 1.0))[..., None, :] - seen
    near = np.exp(-np.einsum("...i,...i->...", gap, gap) / (2 * _REACH**2))
    near = np.where(np.isnan(residual), 0.0, near)
    pull = (near * np.nan_to_num(residual)).sum(axis=-1) / (near.sum(axis=-1) + _DOUBT)
    return np.asarray(plain * np.exp(pull), dtype=np.float64)


@dataclass(frozen=True, eq=False)
class LatencyModel:
    """Latency as a sum over operators plus an offset.

    Attributes:
        sizes: Full size of every axis.
        multiple: Channel block of the device, used where operators are padded.
        operators: One model per operator, in the order of the engine.
        anchors: What each measured build says of the offset.
        method: ``"profiles"`` or ``"macs"``.
        unmatched: Names of operators that count as constant although their shapes vary.
    """

    sizes: Mapping[str, int]
    multiple: int
    operators: tuple[OperatorModel, ...]
    anchors: tuple[Anchor, ...]
    method: str
    unmatched: tuple[str, ...] = ()

    def predict_operators(self, counts: Counts) -> tuple[float, ...]:
        """Predicted milliseconds of every operator, in the order of ``operators``."""
        raw, padded = widths(self.sizes, counts, self.multiple)
        return tuple(
            operator.share * ms(operator.ns(padded if operator.padded else raw))
            for operator in self.operators
        )

    def operators_ms(self, counts: Counts) -> float:
        """Sum of the predicted operators in milliseconds, without the offset."""
        return sum(self.predict_operators(counts))

    def offset_ms(self, operators_ms: float) -> float:
        """What a model whose operators take ``operators_ms`` takes beyond them."""
        if not self.anchors:
            return 0.0
        at, offset, noise = np.array(self.anchors).T
        largest = int(at.argmax())
        spread = (float(at[largest]), max(_CONSTANT, abs(offset[largest] / at[largest])))
        among = _kinship(at, at, spread) + np.diag((noise * spread[0]) ** 2)
        towards = _kinship(np.array([operators_ms]), at, spread)[0]
        return float(towards @ np.linalg.solve(among, offset))

    def predict(self, counts: Counts) -> float:
        """Predicted latency of the whole model in milliseconds."""
        operators = self.operators_ms(counts)
        return operators + self.offset_ms(operators)

    def operator_budget_ms(self, budget_ms: float) -> float:
        """How much the operators may take so that the whole model takes ``budget_ms``."""
        low, high = 0.0, max([budget_ms * 2, *(anchor.operators_ms for anchor in self.anchors)])
        for _ in range(60):
            middle = (low + high) / 2
            if middle + self.offset_ms(middle) <= budget_ms:
                low = middle
            else:
                high = middle
        return low

    def measured(self, counts: Counts, ms: float, half_width: float = 0.0) -> LatencyModel:
        """The same model with one more whole-model measurement taken into the offset.

        Args:
            counts: Kept channels of the build.
            ms: Its measured latency in milliseconds.
            half_width: Of the 95 % interval of that, as a fraction; a wide one counts for less.
        """
        operators = self.operators_ms(counts)
        whole = max([operators, *(anchor.operators_ms for anchor in self.anchors)])
        noise = max(_NOISE, half_width * ms / (1.96 * max(whole, _TINY)))
        return replace(self, anchors=(*self.anchors, Anchor(operators, ms - operators, noise)))

    def without(self, numbers: Collection[int]) -> LatencyModel:
        """The same model where the operators of these numbers are gone, with a block say."""
        left = (o for number, o in enumerate(self.operators) if number not in numbers)
        return replace(self, operators=tuple(left))


def _kinship(one: Array, other: Array, spread: tuple[float, float]) -> Array:
    """Covariance of offsets: a constant part, a part in proportion, and a local part.

    Gaussian-process regression with this kernel splits a single offset between what every call
    costs and what grows with the model, and learns the split from further builds. A small offset
    is split about evenly; a large one cannot be the cost of calls, so it is taken for a slow or
    busy device, i.e. in proportion.

    Args:
        one: Sums of operators in milliseconds.
        other: The same of the builds that were measured.
        spread: The largest sum, and how large the part in proportion may be as a fraction of it.
    """
    base, proportional = spread
    apart = np.log(np.maximum(one, _TINY))[:, None] - np.log(np.maximum(other, _TINY))[None, :]
    near = np.exp(-((apart / _NEAR) ** 2) / 2)
    constant = (_CONSTANT * base) ** 2
    found = constant + proportional**2 * np.outer(one, other) + (_PECULIAR * base) ** 2 * near
    return np.asarray(found, dtype=np.float64)


def widths(
    sizes: Mapping[str, int], counts: Counts, multiple: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Size of every axis at ``counts``: as it is, and rounded up to ``multiple``."""
    raw = {name: counts.get(name, size) for name, size in sizes.items()}
    return raw, {name: in_blocks(size, multiple) for name, size in raw.items()}


def in_blocks(channels: Channels, multiple: int) -> Channels:
    """Channels rounded up to whole blocks of ``multiple``."""
    return -(-channels // multiple) * multiple


def fit(
    graph: Graph,
    builds: Sequence[Build],
    *,
    multiple: int = 1,
    known: Sequence[Point] = (),
) -> LatencyModel:
    """Learn a latency model.

    Args:
        graph: The traced model; its formulas explain the shapes in the profiles.
        builds: The unpruned build first, then probes and corrections.
        multiple: Channel block of the device; convolutions cost whole blocks.
        known: Timings of other models on the same device, for signatures with few points.

    Raises:
        PlanError: There is no build, or nothing was profiled or measured.
    """
    extra = overhead_ns(builds[0].profile, builds[0].measured_ms) if builds else 0.0
    profiled = [replace(b, profile=without(b.profile, extra)) for b in builds if b.profile]
    sizes = {axis.name: axis.size for axis in graph.axes}
    if not profiled:
        return anchored(_fit_macs(graph, sizes, builds), builds)
    found = _identified(graph, profiled)
    padded = [widths(sizes, build.counts, multiple) for build in profiled]
    points = [p for one in found for p in _points(one, padded).values()]
    whole = sum(timing.ns for timing in profiled[0].profile)
    others = [replace(point, ns=max(point.ns - extra, 0.0)) for point in known]
    costs = fit_costs([*points, *others], whole)
    operators = tuple(_operator(one, padded, costs, len(profiled)) for one in found)
    unmatched = tuple(one.seen.name for one in found if not one.matched)
    model = LatencyModel(sizes, multiple, operators, (), "profiles", unmatched)
    return anchored(model, builds)


def signatures(graph: Graph, builds: Sequence[Build]) -> frozenset[str]:
    """What the operators of a model share with those of other models, for a cache of the device."""
    found = _identified(graph, [build for build in builds if build.profile])
    return frozenset(one.signature for one in found if one.work.axes)


def points_of(graph: Graph, builds: Sequence[Build], *, multiple: int = 1) -> tuple[Point, ...]:
    """Every profiled operator as a point with its signature, for a cache of the device."""
    profiled = [build for build in builds if build.profile]
    if not profiled:
        return ()
    sizes = {axis.name: axis.size for axis in graph.axes}
    padded = [widths(sizes, build.counts, multiple) for build in profiled]
    found = _identified(graph, profiled)
    return tuple(p for one in found if one.work.axes for p in _points(one, padded).values())


def _identified(graph: Graph, profiled: Sequence[Build]) -> list[Identified]:
    """The operators of builds with a profile, in execution order."""
    if not profiled:
        return []
    identifier = Identifier(graph, [build.counts for build in profiled])
    return [identifier.identify(seen) for seen in align([b.profile for b in profiled])]


def _points(
    one: Identified, sizes: Sequence[tuple[Mapping[str, int], Mapping[str, int]]]
) -> dict[int, Point]:
    which = 1 if is_convolution(one.seen.kind) else 0
    return {
        build: Point(
            one.seen.kind, one.signature, numbers(one.work, sizes[build][which]), timing.ns
        )
        for build, timing in one.seen.timings.items()
    }


def numbers(work: Work, sizes: Counts) -> tuple[float, float, float]:
    """Work at concrete axis sizes: multiply-accumulates, elements read, elements written."""
    return float(work.macs(sizes)), float(work.read(sizes)), float(work.written(sizes))


def _operator(
    one: Identified,
    sizes: Sequence[tuple[Mapping[str, int], Mapping[str, int]]],
    costs: Mapping[str, Cost],
    builds: int,
) -> OperatorModel:
    points = _points(one, sizes)
    times = np.array([point.ns for point in points.values()])
    steady = OperatorModel(
        name=one.seen.name,
        kind=one.seen.kind,
        signature=one.signature,
        work=NO_WORK,
        cost=(0.0, 0.0, 0.0, float(np.median(times) if one.matched else times[0])),
        padded=is_convolution(one.seen.kind),
        share=one.present / builds,
    )
    if not one.work.axes:
        return steady
    work = np.array([point.work for point in points.values()])
    varying = replace(steady, work=one.work, cost=costs[one.signature])
    plain = varying.time_ns(work)
    residual = np.log(np.maximum(times, 1.0) / np.maximum(plain, 1.0))
    return replace(varying, seen=np.log(np.maximum(work, 1.0)), residual=residual)


def anchored(model: LatencyModel, builds: Sequence[Build]) -> LatencyModel:
    """``model`` with the offsets of those of ``builds`` that were measured."""
    for build in builds:
        if build.measured_ms is not None:
            model = model.measured(build.counts, build.measured_ms, build.half_width)
    return model


def _fit_macs(graph: Graph, sizes: Mapping[str, int], builds: Sequence[Build]) -> LatencyModel:
    """One cost per multiply-accumulate and one fixed cost, from whole-model measurements."""
    measured = [build for build in builds if build.measured_ms is not None]
    if not measured:
        raise PlanError(
            f"{len(builds)} builds without a profile or a measured latency found; the latency "
            "model needs at least one of both: profile or measure the unpruned model"
        )
    points = [
        Point("model", "model", (float(graph.macs(b.counts)), 0.0, 0.0), b.measured_ms * NS_PER_MS)
        for b in measured
        if b.measured_ms is not None
    ]
    cost = fit_costs(points, points[0].ns)["model"]
    each = (cost[0], 0.0, 0.0, 0.0)
    operators = [
        OperatorModel(y.name, y.operator, "model", replace(NO_WORK, macs=y.macs), each)
        for y in graph.layers
    ]
    fixed = OperatorModel("fixed cost", "fixed", "fixed", NO_WORK, (0.0, 0.0, 0.0, cost[3]))
    return LatencyModel(sizes, 1, (*operators, fixed), (), "macs")
