"""What one unit of work costs on a device: non-negative least squares on profiled operators.

In: points, one per operator and build: signature, work in numbers, nanoseconds. Out: for every
signature the cost of a multiply-accumulate, of an element read, of one written, and of a call.

Costs are fitted per signature on relative errors and drawn towards those of all operators of
the same kind, so that a signature with few points borrows from its relatives (ridge towards a
pooled estimate, as in hierarchical regression). Costs are not negative, so time never falls
when a width grows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

Array = npt.NDArray[np.float64]

_PULL = 1.0  # weight of the pooled estimate, in points
_FLOOR = 0.002  # relative errors count fully above this share of the whole time


@dataclass(frozen=True)
class Point:
    """One timing of one operator.

    Attributes:
        kind: The runtime's operator type.
        signature: What operators of equal unit cost share.
        work: Multiply-accumulates, elements read, elements written (padded to channel blocks).
        ns: Time in nanoseconds.
    """

    kind: str
    signature: str
    work: tuple[float, float, float]
    ns: float


Cost = tuple[float, float, float, float]
"""Nanoseconds per multiply-accumulate, element read, element written, and call."""


def fit_costs(points: Sequence[Point], whole_ns: float) -> dict[str, Cost]:
    """Fit the cost of every signature among ``points``.

    Args:
        points: Timings of one device, runtime and precision.
        whole_ns: Time of the whole model; operators far below it weigh less.
    """
    floor = max(1.0, _FLOOR * whole_ns)
    found: dict[str, Cost] = {}
    for family in _grouped(points, lambda p: p.kind).values():
        pooled = _solve(family, floor, None)
        for name, own in _grouped(family, lambda p: p.signature).items():
            cost = _solve(own, floor, pooled)
            found[name] = (float(cost[0]), float(cost[1]), float(cost[2]), float(cost[3]))
    return found


def _grouped(points: Sequence[Point], key: Callable[[Point], str]) -> Mapping[str, list[Point]]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(key(point), []).append(point)
    return groups


def _solve(points: Sequence[Point], floor: float, pooled: Array | None) -> Array:
    """Non-negative cost vector (4,), minimal in relative error, drawn towards ``pooled``."""
    features = np.array([[*point.work, 1.0] for point in points])
    times = np.array([point.ns for point in points])
    weights = 1.0 / (times + floor)
    rows, wanted = features * weights[:, None], times * weights
    if pooled is not None:
        typical = features.mean(axis=0) / (times.mean() + floor)
        pull = np.sqrt(_PULL) * np.diag(typical)
        rows, wanted = np.vstack([rows, pull]), np.concatenate([wanted, pull @ pooled])
    scale = np.linalg.norm(rows, axis=0)
    scale[scale == 0] = 1.0
    cost, _ = nnls(rows / scale, wanted)
    return np.asarray(cost / scale, dtype=np.float64)
