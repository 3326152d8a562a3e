"""Reports as plain text and CSV.

In: the frozen values of ``content``. Out: text; nothing is printed here.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.report.content import Row, RunReport, SweepReport
from prune2deploy.report.tables import (
    compare_table,
    milliseconds,
    percentile_bound,
    result_table,
    sweep_table,
)

WORTH = "what the plan maximises (the worth of its widths, not accuracy)"
Cells = Sequence[Sequence[str]]


def table(head: Sequence[str], rows: Cells, left: Sequence[int] = (0,)) -> str:
    """Align columns: those numbered in ``left`` to the left, the others to the right.

    >>> print(table(["", "ms"], [["a", "1.0"], ["bcd", "12.5"]]))
           ms
    a     1.0
    bcd  12.5
    """
    lines = [list(head), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    shown = (
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )
    return "\n".join(shown)


def run_text(report: RunReport) -> str:
    """The result of a run as a terminal shows it."""
    lines = [
        f"{report.model} on {report.environment.get('target', report.target)}",
        "",
        table(*result_table(report)),
        "",
        f"verdict   {report.verdict}",
        f"budget    {milliseconds(report.budget_ms)} ms; {report.filling()}",
        f"speed-up  {report.speedup:.3f}x, measured interleaved with the baseline",
        f"builds    {report.builds} besides the baseline, {report.seconds:.0f} s in all",
        f"widths    multiples of {report.limits.channel_multiple} "
        f"({report.limits.multiple_source})",
    ]
    lines += [f"parity    {line.text()}" for line in report.parity]
    lines += [f"predicted {line}" for line in (*gains(report), *gap_text(report))]
    if report.removed:
        lines.append(f"removed   {removed_text(report)}")
    return "\n".join([*lines, *(f"note      {note}" for note in report.notes)])


def gains(report: RunReport) -> tuple[str, ...]:
    """What a larger budget would keep, predicted; nothing beyond the ends of the curve.

    Both figures are of the best plans for their budgets, which need not be the plan that is
    shipped. The curve is of medians: a budget for a higher percentile is converted by the measured
    ratio of that percentile to the median.
    """
    if len(report.curve) < 2:
        return ()
    medians, worth = zip(*report.curve, strict=True)
    tail = (report.judged_ms or report.final.p50_ms) / report.final.p50_ms
    here, at = report.budget_ms, [tail * median for median in medians]
    before = float(np.interp(here, at, worth))
    found = []
    tenth = 0.1 * here
    for more in (1.0,) if 0.5 < tenth < 2 else (1.0, tenth):  # not nearly the same twice
        if here >= at[0] and here + more <= at[-1]:
            after = float(np.interp(here + more, at, worth))
            found.append(
                f"a budget of {milliseconds(more)} ms more would keep {after:.1%} instead of "
                f"{before:.1%} of {WORTH}"
            )
    return tuple(found)


def gap_text(report: RunReport) -> tuple[str, ...]:
    """How far the widths are from the best ones of their predicted latency, where it is known."""
    limits = report.limits
    if limits.gap is None:
        return ()
    told = "at most" if limits.gap_exact else "about"
    return (f"other widths of the same latency could keep {told} {limits.gap:.2%} more of {WORTH}",)


def removed_text(report: RunReport) -> str:
    """Which blocks went, and why."""
    many = len(report.removed)
    return (
        f"{many} block{'s' if many > 1 else ''} taken out whole, because widths alone could not "
        f"meet the budget or keep a cap: {', '.join(report.removed)}"
    )


def sweep_text(report: SweepReport) -> str:
    """The latency-against-ratio table as a terminal shows it."""
    target = report.environment.get("target", report.target)
    title = f"{report.model} on {target}, widths in steps of {report.channel_multiple}"
    return "\n".join([title, "", table(*sweep_table(report)), *report.notes])


def compare_text(reports: Sequence[tuple[str, RunReport]]) -> str:
    """Several runs beside each other."""
    return table(*compare_table(reports))


def alone_text(path: Path, alone: Any) -> str:
    """One engine's measurement as a terminal shows it."""
    latency = alone.latency
    low, high = latency.ci95_ms
    tails = (
        f"{percentile_bound(value, tail, latency.unbounded)} ms for p{tail}"
        for tail, value in ((95, latency.p95_ms), (99, latency.p99_ms))
    )
    lines = [
        f"{path}: measured p50 {latency.p50_ms:.4g} ms (95 % {low:.4g}-{high:.4g} in "
        f"this session), upper 95 % bounds {', '.join(tails)}, {latency.samples} samples",
        f"control: two copies of it side by side, ratio {alone.control_ratio:.4f}",
    ]
    return "\n".join([*lines, *(f"flag: {flag}" for flag in alone.flags)])


def pair_text(path: Path, against: Path, seen: Any) -> str:
    """Two engines' comparison as a terminal shows it."""
    low, high = seen.ratio_ci95
    lines = [
        f"{path}: measured p50 {seen.candidate.p50_ms:.4g} ms",
        f"{against}: measured p50 {seen.reference.p50_ms:.4g} ms",
        f"ratio {seen.ratio:.4f} (95 % {low:.4f}-{high:.4f}, {seen.clock} time), "
        f"speed-up {1 / seen.ratio:.3f}x",
    ]
    return "\n".join([*lines, *(f"flag: {flag}" for flag in seen.flags)])


def run_csv(report: RunReport) -> str:
    """Baseline and pruned model, one line each."""
    names = ("p50_ms", "p95_ms", "p99_ms", "ci95_low_ms", "ci95_high_ms")
    head = ["model", "target", "row", *names, "samples", "params", "macs", "bytes"]
    rows = [
        [report.model, report.target, label, *_numbers(row)]
        for label, row in (("baseline", report.baseline), ("pruned", report.final))
    ]
    return _csv(head, rows)


def _numbers(row: Row) -> list[object]:
    low, high = row.ci95_ms
    return [
        *(row.p50_ms, row.p95_ms, row.p99_ms, low, high),
        *(row.samples, row.params, row.macs, row.bytes),
    ]


def sweep_csv(report: SweepReport) -> str:
    """One line per ratio."""
    head = ["ratio", "macs", "params", "p50_ms", "ci95_low_ms", "ci95_high_ms"]
    head += ["speedup", "speedup_ci95_low", "speedup_ci95_high"]
    rows = [
        [p.ratio, p.macs, p.params, p.p50_ms, *p.ci95_ms, p.speedup, *p.speedup_ci95]
        for p in report.points
    ]
    return _csv(head, rows)


def _csv(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows(rows)
    return out.getvalue()
