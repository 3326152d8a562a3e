"""What the tables of reports say: heads and cells as plain text, for terminals and pages alike.

In: the frozen values of ``content``. Out: ``Table`` values; ``text`` aligns them, ``html`` marks
them up.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prune2deploy.report.content import RunReport, SweepReport
from prune2deploy.units import readable


class Table(NamedTuple):
    """A head, and rows of as many cells."""

    head: list[str]
    rows: list[list[str]]


def milliseconds(value: float) -> str:
    """Four significant digits of a time in milliseconds."""
    return f"{value:.4g}" if value < 1000 else f"{value:.0f}"


def interval(bounds: tuple[float, float]) -> str:
    """An interval in milliseconds."""
    return f"{milliseconds(bounds[0])}-{milliseconds(bounds[1])}"


def percentile_bound(value: float, tail: int, unbounded: Sequence[int]) -> str:
    """The bound of a percentile, or the largest sample where there were too few for a bound."""
    return f"{milliseconds(value)}{' (largest sample)' if tail in unbounded else ''}"


def result_table(report: RunReport) -> Table:
    """What the model was and what it is now."""
    before, after = report.baseline, report.final
    old, new = before.p50_ms, after.p50_ms
    rows = [
        ["measured p50 (ms)", milliseconds(old), milliseconds(new), _change(old, new)],
        ["95 % interval of p50 (ms)", interval(before.ci95_ms), interval(after.ci95_ms), ""],
    ]
    for tail, a, b in ((95, before.p95_ms, after.p95_ms), (99, before.p99_ms, after.p99_ms)):
        shown = [percentile_bound(value, tail, row.unbounded)
                 for value, row in ((a, before), (b, after))]  # fmt: skip
        rows.append([f"upper 95 % bound of p{tail} (ms)", *shown, _change(a, b)])
    rows.append(["samples", str(before.samples), str(after.samples), ""])
    for name, a, b, unit in (
        ("parameters", before.params, after.params, ""),
        ("MACs", before.macs, after.macs, ""),
        ("ONNX file", before.bytes, after.bytes, "B"),
    ):
        rows.append([name, readable(a, unit), readable(b, unit), _change(a, b)])
    if (found := report.accuracy) is not None:
        points = f"{100 * (found.final - found.baseline):+.1f} points"
        name = f"top-1 on {found.samples} samples of the data"
        rows.append([name, f"{found.baseline:.1%}", f"{found.final:.1%}", points])
    return Table(["", "baseline", "pruned", "change"], rows)


def _change(old: float, new: float) -> str:
    return f"{new / old - 1:+.1%}" if old else ""


def builds_table(report: RunReport) -> Table:
    """The builds of a run in their order."""
    head = ["build", "parameters", "MACs", "predicted (ms)", "measured (ms)", "95 %", "verdict"]
    rows = [
        [
            f"{s.number} {s.step}",
            readable(s.params),
            readable(s.macs),
            "" if s.predicted_ms is None else milliseconds(s.predicted_ms),
            "" if s.measured_ms is None else milliseconds(s.measured_ms),
            "" if s.ci95_ms is None else interval(s.ci95_ms),
            s.verdict,
        ]
        for s in report.steps
    ]
    return Table(head, rows)


def sweep_table(report: SweepReport) -> Table:
    """Latency against the pruning ratio."""
    head = ["ratio", "MACs", "parameters", "measured p50 (ms)", "95 %", "speed-up", "95 %"]
    rows = [
        [
            f"{p.ratio:.2f}",
            readable(p.macs),
            readable(p.params),
            milliseconds(p.p50_ms),
            interval(p.ci95_ms),
            f"{p.speedup:.3f}x",
            f"{p.speedup_ci95[0]:.3f}-{p.speedup_ci95[1]:.3f}",
        ]
        for p in report.points
    ]
    return Table(head, rows)


def compare_table(reports: Sequence[tuple[str, RunReport]]) -> Table:
    """Several runs beside each other, by name."""
    head = ["run", "target", "budget (ms)", "measured p50 (ms)", "95 %", "speed-up"]
    rows = [
        [
            name,
            r.target,
            milliseconds(r.budget_ms),
            milliseconds(r.final.p50_ms),
            interval(r.final.ci95_ms),
            f"{r.speedup:.3f}x",
            readable(r.final.params),
            readable(r.final.macs),
            str(r.builds),
            "yes" if r.met else "no",
        ]
        for name, r in reports
    ]
    return Table([*head, "parameters", "MACs", "builds", "met"], rows)
