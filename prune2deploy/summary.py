"""From the outcome of a run to its artefacts, manifest and report.

In: an :class:`~prune2deploy.search.job.Outcome`. Out: the files of the run directory, and the
frozen values that ``report`` renders. Nothing is measured here.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import PurePath
from typing import Any

from prune2deploy.backends import registry
from prune2deploy.exporting import companions
from prune2deploy.journal import encode
from prune2deploy.measure import DISTURBED, Comparison, LatencyStats
from prune2deploy.plan import pairing
from prune2deploy.plan.choices import grid
from prune2deploy.plan.latency_model import numbers
from prune2deploy.report import write
from prune2deploy.report.content import (
    AccuracyLine,
    AxisLine,
    BuildLine,
    LayerLine,
    Limits,
    ParityLine,
    Row,
    RunReport,
)
from prune2deploy.rundir import MANIFEST, RunDir
from prune2deploy.search import candidate, saving
from prune2deploy.search.candidate import Built
from prune2deploy.search.job import Attempt, Job, Outcome
from prune2deploy.units import ms

VERDICTS: Mapping[str, str] = {
    "met": "budget met",
    "missed": "budget missed with the builds allowed",
    "unreachable": "budget unreachable",
    "uncertain": "too unstable to decide",
}
STEADY = 1.05  # slowest over fastest session of a machine that keeps its speed
EXIT_CODES: Mapping[str, int] = {"met": 0, "missed": 4, "unreachable": 4, "uncertain": 6}


def finish(job: Job, outcome: Outcome, seconds: float, name: str) -> RunReport:
    """Write artefacts, report and manifest of a run; the manifest comes last.

    Raises:
        ParityError: What would be shipped gives other outputs than the pruned module.
    """
    run, final = job.run, outcome.final
    candidate.require(final.built.borders)
    base = outcome.baseline.built
    run.discard(MANIFEST, "model.pt2")  # of an earlier session: they are not of what follows
    keep(run, base.onnx, "baseline.onnx")
    keep(run, final.built.onnx, "model.onnx")
    _keep_engine(run, PurePath(final.built.engine))
    run.write_text("plan.json", final.built.plan.to_json() + "\n")
    run.write_text("target.toml", outcome.target.text)
    trouble = saving.save_module(run, outcome.module, job.example_inputs)
    report = describe(outcome, seconds, name, (trouble,) if trouble else ())
    report = replace(report, notes=tuple(map(job.spelled, report.notes)))
    write.write(report, run)
    run.finish(manifest(outcome, report))
    return report


def keep(run: RunDir, source: str, name: str) -> None:
    """Copy a working file to its final place; a run that is rendered again has it there."""
    if not (run / source).exists() and (run / name).exists():
        return
    with run.place(name) as temporary:
        if source.endswith(".onnx"):
            companions.copy(run / source, temporary)
        else:
            shutil.copyfile(run / source, temporary)


def _keep_engine(run: RunDir, source: PurePath) -> None:
    """Copy the engine, with the manifest and the build log that some runtimes put beside it."""
    keep(run, str(source), f"engine{source.suffix}")
    for ending in (f"{source.suffix}.json", ".build.log"):
        if (run / str(source.with_suffix(ending))).exists():
            keep(run, str(source.with_suffix(ending)), f"engine{ending}")


def describe(outcome: Outcome, seconds: float, name: str, notes: tuple[str, ...]) -> RunReport:
    """The report of a run."""
    final, steps = outcome.final, _steps(outcome)
    seen = final.comparison
    flags = (f"measurement flagged: {', '.join(seen.flags)}",) if seen.flags else ()
    return RunReport(
        model=name,
        target=outcome.target.name,
        met=outcome.verdict == "met",
        verdict=verdict_text(outcome),
        budget_ms=final.budget_ms,
        speedup=1 / seen.ratio,
        builds=sum(step.number > 0 for step in steps),
        seconds=seconds,
        baseline=_row(seen.reference, outcome.baseline.built),
        final=_row(seen.candidate, final.built),
        accuracy=_accuracy(outcome),
        limits=_limits(outcome),
        parity=tuple(_parity(final.built)),
        removed=final.built.plan.removed,
        curve=_curve(outcome),
        axes=_axes(outcome),
        layers=_layers(outcome),
        steps=steps,
        environment=environment(outcome.target, seen.fingerprint),
        notes=(*_notes(outcome), *flags, *notes),
        percentile=final.budget.percentile,
        judged_ms=final.value_ms,
        bound_ms=final.bound_ms,
    )


def _accuracy(outcome: Outcome) -> AccuracyLine | None:
    found = outcome.accuracy
    return None if found is None else AccuracyLine(found.samples, found.unpruned, found.pruned)


def _notes(outcome: Outcome) -> tuple[str, ...]:
    paid = (outcome.paid.text(),) if outcome.paid else ()
    return (*paid, *outcome.notes, *outcome.final.built.notes, *_speeds(outcome))


def _speeds(outcome: Outcome) -> tuple[str, ...]:
    """A note where the machine changed its speed, which matters for a budget in milliseconds."""
    if outcome.final.budget.latency_ms is None:
        return ()
    references = (attempt.comparison.reference for attempt in outcome.attempts)
    measured = (outcome.baseline.measured.latency, *references)
    least, most = (pick(one.p50_ms for one in measured) for pick in (min, max))
    if most <= STEADY * least:
        return ()
    return (
        f"the unpruned model took {least:.4g} to {most:.4g} ms in the {len(measured)} sessions of "
        "this run, so this machine changes its speed: the verdict is of the last session, and "
        "--speedup names a budget that does not depend on it",
    )


def verdict_text(outcome: Outcome) -> str:
    """The verdict in words; for an unreachable budget with the latency of the smallest plan."""
    told = VERDICTS[outcome.verdict]
    final = outcome.final
    if outcome.verdict == "uncertain" and final.budget.percentile != 50:
        return f"{told}: {_undecided(outcome)}"
    if outcome.verdict != "unreachable" or outcome.floor_ms is None:
        return told
    told += (
        f": the smallest plan measured {outcome.floor_ms:.4g} ms against a budget of "
        f"{outcome.final.budget_ms:.4g} ms"
    )
    share = fixed_share(outcome)
    if share is None:
        return told
    return (
        f"{told}, and {share:.0%} of the baseline's profiled time is what pruning cannot touch "
        "(operators without a prunable width, and what every call costs)"
    )


def _undecided(outcome: Outcome) -> str:
    """Why a high percentile was neither met nor missed, and what to do; see ``judge``."""
    final, seen = outcome.final, outcome.final.comparison
    tail = f"p{final.budget.percentile}"
    if final.budget.percentile in seen.candidate.unbounded:
        return (
            f"{seen.candidate.samples} samples within the time limit of "
            f"{outcome.target.measure.max_seconds:g} s are too few to bound {tail}; raise "
            "max_seconds in the target's [measure]"
        )
    flags = ", ".join(flag for flag in seen.flags if flag in DISTURBED)
    return (
        f"the median is within the budget and the upper 95 % bound of {tail} is not, on a host "
        f"that was disturbed ({flags}) and may have made the difference; measure again on a "
        "quieter one"
    )


def manifest(outcome: Outcome, report: RunReport) -> dict[str, Any]:
    """What other programs read; see ``rundir.KEYS``."""
    seen = outcome.final.comparison
    return {
        "met": report.met,
        "verdict": outcome.verdict,
        "budget_ms": report.budget_ms,
        "percentile": report.percentile,
        "judged_ms": report.judged_ms,
        "bound_ms": report.bound_ms,
        "speedup": report.speedup,
        "builds": report.builds,
        "seconds": report.seconds,
        "threads": outcome.target.threads,
        "target": {
            "name": outcome.target.name,
            "precision": outcome.target.precision,
            "channel_multiple": outcome.multiple,
            "sha256": outcome.target.sha256,
            "text": outcome.target.text,
        },
        "host": encode(seen.fingerprint),
        "baseline": encode(report.baseline),
        "final": encode(report.final),
        "parity": [encode(line) for line in report.parity],
        "precision": _precision(outcome),
        "accuracy": encode(report.accuracy),
        "removed": list(report.removed),
        "floor_ms": outcome.floor_ms,
        "fixed_share": report.limits.fixed_share,
        "model": report.model,
        "measurement": _measurement(seen),
        "notes": list(report.notes),
    }


def _measurement(seen: Comparison) -> dict[str, Any]:
    return {
        "ratio": seen.ratio,
        "ratio_ci95": list(seen.ratio_ci95),
        "clock": seen.clock,
        "wall_p50_ms": seen.wall_p50_ms,
        "control_ratio": seen.control_ratio,
        "stopped": seen.stopped,
        "flags": list(seen.flags),
    }


def _precision(outcome: Outcome) -> dict[str, Any]:
    return {
        "chosen": outcome.target.precision,
        "against_fp32": encode(outcome.paid),
        "lowered": encode(outcome.final.built.lowered),
    }


def _row(latency: LatencyStats, built: Built) -> Row:
    return Row(**vars(latency), params=built.params, macs=built.macs, bytes=built.bytes)


def _parity(built: Built) -> list[ParityLine]:
    return [
        ParityLine(
            border=border.stages,
            max_abs=border.parity.max_abs,
            max_rel=border.parity.max_rel,
            tolerance=border.parity.tolerance,
            output=border.parity.worst_output,
            passed=border.parity.passed,
            error=border.parity.error,
            judged=border.parity.judged,
        )
        for border in built.borders
    ]


def fixed_share(outcome: Outcome) -> float | None:
    """Share of the operators' time that no width changes; ``None`` where none was profiled."""
    model = outcome.whole or outcome.model
    if model is None or model.method != "profiles":
        return None
    calls = sum(operator.share * ms(operator.cost[3]) for operator in model.operators)
    return min(1.0, calls / max(model.operators_ms({}), 1e-12))


def _limits(outcome: Outcome) -> Limits:
    return Limits(
        floor_ms=outcome.floor_ms,
        fixed_share=fixed_share(outcome),
        overhead_ms=_overhead(outcome),
        channel_multiple=outcome.multiple,
        multiple_source=outcome.multiple_source,
        memory_share=memory_share(outcome),
        gap=outcome.gap.share if outcome.gap else None,
        gap_exact=outcome.gap is None or outcome.gap.exact,
    )


def memory_share(outcome: Outcome) -> float | None:
    """Share of the baseline's operator time that goes with elements moved, by the fitted costs."""
    model = outcome.whole or outcome.model
    if model is None or model.method != "profiles":
        return None
    moved = 0.0
    for operator in model.operators:
        _, read, written = numbers(operator.work, model.sizes)
        moved += operator.share * ms(operator.cost[1] * read + operator.cost[2] * written)
    return min(1.0, moved / max(model.operators_ms({}), 1e-12))


def _overhead(outcome: Outcome) -> float | None:
    """Time outside operators; unknown unless wall time and profile are of an undisturbed host."""
    measured, profile = outcome.baseline.measured, outcome.baseline.profile
    quiet = measured.undisturbed_p50_ms
    if measured.flags or quiet is None or not profile:
        return None
    return max(0.0, quiet - sum(ms(o.ns) for o in profile))


def _axes(outcome: Outcome) -> tuple[AxisLine, ...]:
    plan = outcome.final.built.plan
    counts = plan.counts
    left = {axis.name for axis in outcome.graph.without(plan.removed).axes}
    steps = grid(outcome.graph, outcome.multiple)
    return tuple(
        AxisLine(
            name=axis.name,
            kept=counts.get(axis.name, axis.size) if axis.name in left else 0,
            size=axis.size,
            frozen=axis.frozen,
            off_step=axis.name in counts and counts[axis.name] % steps[axis.name] != 0,
        )
        for axis in outcome.graph.axes
    )


def _layers(outcome: Outcome) -> tuple[LayerLine, ...]:
    """Operators of both engines, those that correspond in one line whatever they are called."""
    predicted = _predicted(outcome.final, outcome)
    found = []
    for seen in pairing.align([outcome.baseline.profile, outcome.final.profile]):
        times = {build: ms(timing.ns) for build, timing in seen.timings.items()}
        found.append(
            LayerLine(seen.name, seen.kind, times.get(0), times.get(1), predicted.get(seen.name))
        )
    return tuple(found)


def _predicted(final: Attempt, outcome: Outcome) -> dict[str, float]:
    if outcome.model is None:
        return {}
    times = outcome.model.predict_operators(final.built.plan.counts)
    return {o.name: t for o, t in zip(outcome.model.operators, times, strict=True)}


def _curve(outcome: Outcome) -> tuple[tuple[float, float], ...]:
    """Predicted milliseconds and retained worth, at the machine's speed in the last session."""
    scale = outcome.final.comparison.reference.p50_ms / outcome.baseline.p50_ms
    return tuple((scale * at, worth) for at, worth in outcome.curve)


def _steps(outcome: Outcome) -> tuple[BuildLine, ...]:
    """Builds in order; predictions are scaled to the speed of the machine in that session."""
    others = [
        BuildLine(b.number, b.step, b.params, b.macs)
        for b in (*outcome.probes, *outcome.superseded)
    ]
    tried = [
        BuildLine(
            number=a.built.number,
            step=a.built.step,
            params=a.built.params,
            macs=a.built.macs,
            predicted_ms=a.predicted_ms * a.comparison.reference.p50_ms / outcome.baseline.p50_ms,
            measured_ms=a.comparison.candidate.p50_ms,
            ci95_ms=a.comparison.candidate.ci95_ms,
            verdict=a.verdict,
        )
        for a in outcome.attempts
    ]
    return tuple(sorted((*others, *tried), key=lambda line: line.number))


def environment(target: Any, fingerprint: Mapping[str, Any]) -> dict[str, str]:
    """Facts that latency depends on, as text; ``machine`` is what comparisons must share."""
    facts = {
        "machine": f"{fingerprint.get('cpu') or platform.machine()}, "
        f"{fingerprint.get('cores', '?')} cores",
        "target": f"{target.name} ({target.backend} on {target.device}, {target.precision})",
        "threads": str(target.threads or "left to the runtime"),
    }
    known = {*facts, "cpu", "cores"}
    facts |= {k: _text(v) for k, v in fingerprint.items() if k not in known}
    return facts | {f"{n} version": v for n, v in registry.for_target(target).versions().items()}


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {v}" for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return " ".join(map(str, value))
    return str(value)
