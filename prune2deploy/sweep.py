"""Latency against pruning ratio: every axis loses the same fraction, each model is measured.

In: a :class:`~prune2deploy.search.job.Job`. Out: a report with one point per ratio, measured
interleaved with the unpruned model. Widths stay on the grid of the target's channel multiple, so
neighbouring ratios may give the same model; it is then built and measured once.
"""

from __future__ import annotations

from collections.abc import Mapping

from prune2deploy import summary
from prune2deploy.calibration import notices
from prune2deploy.config import SweepOptions
from prune2deploy.graph import Graph
from prune2deploy.importance import check, score
from prune2deploy.measure import Comparison
from prune2deploy.plan.allocate import channels
from prune2deploy.plan.choices import Floats, choices, importance_curves
from prune2deploy.report import write
from prune2deploy.report.content import SweepPoint, SweepReport
from prune2deploy.search import candidate, opening, probing, recall
from prune2deploy.search.candidate import Built
from prune2deploy.search.job import Job


def uniform_counts(
    graph: Graph, curves: Mapping[str, Floats], ratio: float, multiple: int
) -> dict[str, int]:
    """Kept channels when every axis loses the fraction ``ratio``, on the grid of ``multiple``.

    Each width is the option nearest to what the ratio leaves, the wider of two as near.
    """
    counts: dict[str, int] = {}
    for choice in choices(graph, curves, multiple=multiple, limit=100_000):
        wanted = (1 - ratio) * choice.size
        width = int(min(choice.options, key=lambda n: (abs(n - wanted), -n)))
        counts.update(dict.fromkeys(choice.axes, width))
    return counts


def sweep(job: Job, options: SweepOptions, name: str) -> SweepReport:
    """Build and measure one model per ratio, and write the report into the run directory.

    Raises:
        TraceError: The model does not run or has nothing to prune.
        MissingBackend: The target is not usable here.
        BackendError: A build failed.
        MeasureError: A measurement failed.
    """
    job.run.journal.open_session()
    check(options.importance, job.batches)
    shop = opening.open_workshop(job, options.model, len(options.ratios))
    timings = recall.timings(shop.target, shop.backend)
    multiple, _ = probing.settle(shop, timings)
    scores = score(options.importance, job.module, shop.graph, job.batches)
    curves = importance_curves(shop.graph, scores)
    baseline = candidate.baseline(shop)
    seen: dict[str, tuple[Built, Comparison]] = {}
    points = []
    for number, ratio in enumerate(options.ratios, start=1):
        plan = channels(shop.graph, scores, uniform_counts(shop.graph, curves, ratio, multiple))
        same = plan.to_json()
        if same not in seen:
            built = candidate.build(shop, number, "ratio", plan) if plan.kept else baseline
            seen[same] = (built, candidate.compare(shop, built, baseline))
        points.append(_point(ratio, *seen[same]))
    first = next(iter(seen.values()))[1]
    told = [note for built in (baseline, *(b for b, _ in seen.values())) for note in built.notes]
    report = SweepReport(
        model=name,
        target=shop.target.name,
        channel_multiple=multiple,
        baseline_ms=first.reference.p50_ms,
        points=tuple(points),
        environment=summary.environment(shop.target, first.fingerprint),
        notes=tuple(dict.fromkeys((*notices(job.batches), *timings.notes, *told))),
    )
    summary.keep(job.run, baseline.onnx, "baseline.onnx")
    write.write(report, job.run)
    job.run.clear_work()
    return report


def _point(ratio: float, built: Built, seen: Comparison) -> SweepPoint:
    low, high = seen.ratio_ci95
    return SweepPoint(
        ratio=ratio,
        macs=built.macs,
        params=built.params,
        p50_ms=seen.candidate.p50_ms,
        ci95_ms=seen.candidate.ci95_ms,
        speedup=1 / seen.ratio,
        speedup_ci95=(1 / high, 1 / low),
    )
