"""From raw samples to results: which clock counts, ratio, percentiles, flags. Pure functions.

The ratio of candidate to reference comes from pairs of runs. The scale in milliseconds comes from
the median wall time of the reference in the same session, so an interval in milliseconds holds the
errors of both. Where a device reports its own time, a run counts as that time plus what the host
adds (launching, waiting) in the median run of the same engine: device time is steady but leaves
out the waiting, and wall time includes the waiting but is not steady.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from prune2deploy.measure import stats
from prune2deploy.measure.deadline import Goal
from prune2deploy.measure.samples import CPU, DEVICE, WALL, Ints, Samples
from prune2deploy.measure.stats import Floats
from prune2deploy.target import Target
from prune2deploy.units import ms

CLOCKS = ("wall", "cpu", "device")
DISTURBED = frozenset({"noisy host", "steal", "throttled", "drift"})  # flags that the host causes


@dataclass(frozen=True)
class LatencyStats:
    """Latency of one engine in milliseconds.

    Attributes:
        p50_ms: Median.
        p95_ms: Upper 95 % confidence bound of the 95th percentile of wall time.
        p99_ms: The same of the 99th.
        ci95_ms: 95 % interval of the median, of this session: a machine that has another speed
            tomorrow gives another median.
        samples: Runs that it rests on.
        unbounded: Percentiles among 95 and 99 that there were too few samples for; the largest
            sample stands in for their bound.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    ci95_ms: tuple[float, float]
    samples: int
    unbounded: tuple[int, ...] = ()


@dataclass(frozen=True)
class Comparison:
    """A candidate measured beside a reference.

    The median of the candidate is that of the reference's wall time multiplied by ``ratio``: pairs
    fix the relation of the two far better than either can be known by itself on a shared machine.
    Its interval joins that of the ratio and that of the reference's median, whose errors do not
    depend on each other. ``wall_p50_ms`` is the candidate's plain wall median, for comparison.

    Attributes:
        candidate: Latency of the candidate.
        reference: Latency of the reference, wall time of the same session.
        ratio: Candidate over reference.
        ratio_ci95: Its 95 % interval.
        clock: What the ratio was taken from: ``"cpu"`` (CPU time of the thread), ``"wall"`` or
            ``"device"`` (its own time, and what the host takes beyond it in the median run).
        wall_p50_ms: Plain wall median of the candidate.
        control_ratio: The same ratio between two copies of the reference (A/A); ``None`` without.
        control_ci95: Its 95 % interval.
        stopped: ``"precise"``, or ``"time"`` where the time was up before that.
        flags: What to mistrust, one word or two each; empty is good.
        outliers: Wall samples of the candidate beyond Tukey's fences, by kind; none was dropped.
        fingerprint: Facts of the host and runtime; never pool samples of different ones.
        undisturbed_p50_ms: Wall median of the reference over the runs that never waited for a
            processor; ``None`` where fewer than ten such runs are known.
        disturbance: What the host did meanwhile; see ``disturbance``.
    """

    candidate: LatencyStats
    reference: LatencyStats
    ratio: float
    ratio_ci95: tuple[float, float]
    clock: str
    wall_p50_ms: float
    control_ratio: float | None
    control_ci95: tuple[float, float] | None
    stopped: str
    flags: tuple[str, ...]
    outliers: Mapping[str, int]
    fingerprint: Mapping[str, Any]
    undisturbed_p50_ms: float | None = None
    disturbance: Mapping[str, float] = field(default_factory=dict)


def choose_clock(samples: Samples, target: Target) -> int:
    """Return the column of the clock that the ratio is taken from.

    Device time where the backend gives it. CPU time where the calling thread does all the work:
    one thread, on a CPU, and its CPU time plus its waiting for a processor makes up 90 % of the
    wall time (or of the wall time of the least disturbed runs, where the kernel does not tell).
    Else wall time.
    """
    both = np.concatenate([samples.candidate, samples.reference])
    if both.size and (both[:, DEVICE] > 0).all():
        return DEVICE
    if target.threads != 1 or not target.device.lower().startswith("cpu") or not both.size:
        return WALL
    delay = samples.noise[:, 3].sum()
    every = np.concatenate([both, samples.twin])
    accounted = (every[:, CPU].sum() + delay) / max(1, every[:, WALL].sum())
    undisturbed = np.quantile(both[:, CPU] / np.maximum(1, both[:, WALL]), 0.9)
    share = both[:, CPU].sum() / max(1, both[:, WALL].sum())
    valid = share > 0.1 and max(accounted, undisturbed) >= 0.9
    return CPU if valid else WALL


def effects(samples: Samples, clock: int) -> Floats:
    """Logarithm of candidate over reference, one per block (blocks,)."""
    return _effects(samples.candidate, samples.reference, samples.block, clock)


def _effects(first: Ints, second: Ints, block: Ints, clock: int) -> Floats:
    logs = np.log(times(first, clock) / times(second, clock))
    return stats.block_medians(logs, block)


def times(rows: Ints, clock: int) -> Floats:
    """Nanoseconds that each run (runs, 3) of one engine counts for by a clock, 1 at least."""
    own = rows[:, clock].astype(np.float64)
    if clock == DEVICE and len(rows):
        own += np.median(np.maximum(0, rows[:, WALL] - rows[:, DEVICE]))
    return np.maximum(1.0, own)


def summarise(samples: Samples, target: Target) -> Comparison:
    """Turn raw samples into a result.

    Args:
        samples: As taken; ``notes`` carry ``stopped``, ``warm``, ``cooled`` and ``fingerprint``.
        target: Where they were taken.
    """
    clock = choose_clock(samples, target)
    block_effects = effects(samples, clock)
    ratio, interval = stats.ratio_interval(block_effects)
    reference = _latency(samples.reference[:, WALL])
    plain = _latency(samples.candidate[:, WALL])
    control = _control(samples, clock)
    found = Comparison(
        candidate=replace(
            plain,
            p50_ms=reference.p50_ms * ratio,
            ci95_ms=joined((reference.p50_ms, reference.ci95_ms), (ratio, interval)),
        ),
        reference=reference,
        ratio=ratio,
        ratio_ci95=interval,
        clock=CLOCKS[clock],
        wall_p50_ms=plain.p50_ms,
        control_ratio=control[0] if control else None,
        control_ci95=control[1] if control else None,
        stopped=str(samples.notes.get("stopped", "")),
        flags=(),
        outliers=stats.outliers(samples.candidate[:, WALL].astype(float)),
        fingerprint=samples.notes.get("fingerprint", {}),
        undisturbed_p50_ms=_undisturbed(samples.reference),
        disturbance=disturbance(samples),
    )
    return replace(found, flags=_flags(samples, target, clock, found))


Estimate = tuple[float, tuple[float, float]]
"""A value and its interval."""


def joined(first: Estimate, second: Estimate) -> tuple[float, float]:
    """Interval of the product of two positive values with independent errors."""
    value = first[0] * second[0]
    down = [math.log(centre / low) if low > 0 else math.inf for centre, (low, _) in (first, second)]
    up = [math.log(high / centre) for centre, (_, high) in (first, second)]
    return value * math.exp(-math.hypot(*down)), value * math.exp(math.hypot(*up))


def judgeable(samples: Samples, clock: int, goal: Goal, half_width: float) -> bool:
    """Whether what was sampled so far can be held against a deadline.

    For a high percentile, there are samples enough to bound it. For the median, its interval is
    within three times ``half_width`` (shared machines hardly allow less), or a stricter one lies
    whole on one side of the limit.
    """
    if goal.percentile != 50:
        return stats.upper_quantile(_wall(samples.candidate), goal.percentile / 100)[1]
    wall = _wall(samples.reference)
    scale, (ratio, bounds) = float(np.median(wall)), stats.ratio_interval(effects(samples, clock))
    low, high = joined((scale, stats.median_interval(wall)), (ratio, bounds))
    if low > 0 and np.log(high / low) / 2 <= np.log1p(3 * half_width):
        return True
    strict = stats.median_interval(wall, stats.EARLY_LEVEL)
    low, high = joined((scale, strict), (ratio, bounds))
    return ms(high) <= goal.limit_ms or ms(low) > goal.limit_ms


def _wall(rows: Ints) -> Floats:
    return rows[:, WALL].astype(np.float64)


def disturbance(samples: Samples) -> dict[str, float]:
    """Say what the host did while sampling.

    Returns:
        ``cpu_share`` (CPU time over wall time of the runs), ``involuntary`` (switches per run),
        ``waiting`` (share of time waiting for a processor), ``pressure`` (share of time in which
        some task of the host did) and ``steal`` (share taken by the hypervisor, at ticks of 10 ms).
    """
    runs = np.concatenate([samples.candidate, samples.reference, samples.twin])
    noise = samples.noise.sum(axis=0).astype(float)
    wall = max(1.0, noise[0])
    return {
        "cpu_share": float(runs[:, CPU].sum() / max(1, runs[:, WALL].sum())),
        "involuntary": float(noise[1] / max(1, len(runs))),
        "waiting": float(noise[3] / wall),
        "pressure": float(noise[4] * 1e3 / wall),
        "steal": float(noise[5] * 1e7 / wall),
    }


def _undisturbed(rows: Ints) -> float | None:
    """Wall median in ms of the runs whose CPU time is 98 % of their wall time or more."""
    calm = rows[rows[:, CPU] >= 0.98 * rows[:, WALL], WALL]
    return ms(float(np.median(calm))) if len(calm) >= 10 else None


def _latency(wall: Ints) -> LatencyStats:
    values = wall.astype(float)
    low, high = stats.median_interval(values)
    bounds = {tail: stats.upper_quantile(values, tail / 100) for tail in (95, 99)}
    return LatencyStats(
        p50_ms=ms(float(np.median(values))),
        p95_ms=ms(bounds[95][0]),
        p99_ms=ms(bounds[99][0]),
        ci95_ms=(ms(low), ms(high)),
        samples=len(values),
        unbounded=tuple(tail for tail, (_, enough) in bounds.items() if not enough),
    )


def _control(samples: Samples, clock: int) -> Estimate | None:
    if not samples.twin.size or samples.block[-1] < 1:
        return None
    return stats.ratio_interval(_effects(samples.twin, samples.reference, samples.block, clock))


def _flags(samples: Samples, target: Target, clock: int, found: Comparison) -> tuple[str, ...]:
    """What to mistrust of a result that is whole but for this."""
    host, unbounded = found.disturbance, found.candidate.unbounded
    drift = stats.drift(stats.block_medians(times(samples.reference, clock), samples.block))
    low, high = found.ratio_ci95
    wide = low < high / (1 + target.measure.half_width) ** 2  # so one block, from 0 to infinity
    control, bounds = found.control_ratio, found.control_ci95
    checks = {
        "not warm": not samples.notes.get("warm", True),
        "noisy host": (clock == CPU and host["cpu_share"] < 0.9) or host["pressure"] > 0.1,
        "steal": host["steal"] > 0.02,
        "throttled": drift.throttled,
        "drift": abs(drift.change) > stats.DRIFTED and not drift.throttled,
        "wide interval": wide,
        "too few samples for p95": 95 in unbounded,
        "too few samples for p99": 99 in unbounded,
        "opened once": not samples.notes.get("reopened", True),
        "control off": control is not None and bounds is not None and off(control, bounds),
    }
    return tuple(name for name, raised in checks.items() if raised)


def off(ratio: float, interval: tuple[float, float]) -> bool:
    """Whether an A/A control differs from 1 for sure and by more than one per cent."""
    return abs(ratio - 1) > 0.01 and not interval[0] <= 1 <= interval[1]
