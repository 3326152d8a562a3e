"""Measure engines honestly: side by side, in a fresh process, until the interval is narrow.

In: built engines and their target. Out: frozen results; raw samples in a file where asked for.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.measure import child, samples
from prune2deploy.measure.deadline import Goal
from prune2deploy.measure.sample import interleaved
from prune2deploy.measure.samples import Samples
from prune2deploy.measure.summary import Comparison, LatencyStats, off, summarise
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming

STARTUP_SECONDS = 180.0
"""Allowance for opening the engines, before the time limit of a child process."""


def compare(
    candidate: Engine,
    reference: Engine,
    target: Target,
    *,
    raw_path: Path | None = None,
    goal: Goal | None = None,
) -> Comparison:
    """Time two engines side by side.

    Args:
        candidate: The engine in question.
        reference: What it is compared with, usually the baseline.
        target: Where; its policy says how precisely and how long.
        raw_path: Keep the raw samples in this file (``.npz``).
        goal: A deadline that the candidate is held against; sampling goes on until it can be
            judged as well, within the time limit. ``None`` for the ratio alone.

    Raises:
        MeasureError: The measuring process crashed or did not end.
        BackendError: An engine could not be opened or run.
    """
    taken = _take((candidate, reference), target, raw_path, goal)
    return summarise(taken, target)


@dataclass(frozen=True)
class Measurement:
    """One engine measured by itself.

    Attributes:
        latency: Wall time.
        clock: Clock that the control's ratio was taken from.
        control_ratio: Of two copies of the engine side by side; far from 1 means a poor host.
        control_ci95: Its 95 % interval.
        flags: What to mistrust; ``control off`` where that ratio differs from 1 for sure.
        fingerprint: Facts of host and runtime.
        undisturbed_p50_ms: Wall median of the runs that never waited for a processor; ``None``
            where fewer than ten such runs are known.
        disturbance: What the host did meanwhile; see ``summary.disturbance``.
    """

    latency: LatencyStats
    clock: str
    control_ratio: float
    control_ci95: tuple[float, float]
    flags: tuple[str, ...]
    fingerprint: Mapping[str, Any]
    undisturbed_p50_ms: float | None = None
    disturbance: Mapping[str, float] = field(default_factory=dict)


def single(engine: Engine, target: Target, *, raw_path: Path | None = None) -> Measurement:
    """Time one engine: two copies of it side by side, so that the control comes for free.

    Raises:
        MeasureError: The measuring process crashed or did not end.
        BackendError: The engine could not be opened or run.
    """
    policy = replace(target.measure, control=False)
    taken = _take((engine, engine), replace(target, measure=policy), raw_path, None)
    both = summarise(taken, target)
    flags = ("control off",) if off(both.ratio, both.ratio_ci95) else ()
    return Measurement(
        latency=both.reference,
        clock=both.clock,
        control_ratio=both.ratio,
        control_ci95=both.ratio_ci95,
        flags=(*both.flags, *flags),
        fingerprint=both.fingerprint,
        undisturbed_p50_ms=both.undisturbed_p50_ms,
        disturbance=both.disturbance,
    )


def profile(
    engine: Engine,
    target: Target,
    *,
    runs: int = 30,
    beside: tuple[Engine, Sequence[OperatorTiming]] | None = None,
) -> tuple[OperatorTiming, ...]:
    """Time every operator of an engine in a fresh process; the minimum over ``runs`` of each.

    Args:
        engine: The engine.
        target: Where.
        runs: How many.
        beside: An engine that was profiled before, and its operators then. It is profiled again
            before and after ``engine``, whose times are scaled by what has changed: machines
            change speed between two profiles, and operators of the two could not be compared.

    Raises:
        MeasureError: The process crashed or did not end.
        BackendError: The engine could not be opened or run.
    """
    backend = registry.for_target(target)
    if backend.simulated:
        with backend.open(engine, target) as session:
            feeds = random_feeds(session.inputs, seed=0, onnx=engine.onnx)
        return backend.profile(engine, target, feeds, runs)
    known_ns = sum(timing.ns for timing in beside[1]) if beside else 0.0
    engines = (engine, beside[0]) if beside and known_ns else (engine,)
    spec = {**_spec(engines, target, "profile"), "runs": runs}
    result = child.run(spec, STARTUP_SECONDS + target.measure.max_seconds)
    again = result["reference_ns"]
    scale = known_ns / statistics.geometric_mean(again) if again and all(again) else 1.0
    timings = map(OperatorTiming.from_dict, result["operators"])
    return tuple(replace(one, ns=scale * one.ns) for one in timings)


def _take(
    engines: tuple[Engine, Engine],
    target: Target,
    raw_path: Path | None,
    goal: Goal | None,
) -> Samples:
    """Take the samples where they belong: simulated ones here, real ones in a child process."""
    backend = registry.for_target(target)
    if backend.simulated:
        taken = interleaved(backend, engines, target, goal=goal)
        if raw_path is not None:
            samples.save(taken, raw_path)
        return taken
    with tempfile.TemporaryDirectory(prefix="prune2deploy-raw-") as folder:
        raw = raw_path.resolve() if raw_path else Path(folder) / "raw.npz"
        spec = {
            **_spec(engines, target, "compare"),
            "raw": str(raw),
            "goal": None if goal is None else asdict(goal),
            "scratch": [folder],
        }
        child.run(spec, STARTUP_SECONDS + 2.5 * target.measure.max_seconds)
        return samples.load(raw)


def _spec(engines: tuple[Engine, ...], target: Target, task: str) -> dict[str, Any]:
    return {
        "task": task,
        "target": target.to_dict(),
        "threads": target.threads,
        "engines": [
            {
                "path": str(e.path.resolve()),
                "onnx": str(e.onnx.resolve()),
                "backend": e.backend,
                "precision": e.precision,
            }
            for e in engines
        ],
    }
