"""The plots of a report as PNG files (matplotlib without a display and without global state).

In: the frozen values of ``content`` and a path. Out: a PNG file at that path.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune2deploy.report.content import RunReport, SweepReport

BASE, PRUNED = "#8b96a3", "#1f6feb"


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def sweep_plot(report: SweepReport, path: Path) -> None:
    """Measured latency and speed-up against the ratio, with 95 % intervals."""
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    ratios = [p.ratio for p in report.points]
    middle = [p.p50_ms for p in report.points]
    below = [max(0.0, p.p50_ms - p.ci95_ms[0]) for p in report.points]
    above = [max(0.0, p.ci95_ms[1] - p.p50_ms) for p in report.points]
    axes.errorbar(ratios, middle, yerr=(below, above), marker="o", color=PRUNED, capsize=3)
    axes.set_xlabel("fraction of channels removed")
    axes.set_ylabel("measured p50 (ms)")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.set_title(f"{report.model} on {report.target}")
    figure.savefig(path, format="png", dpi=120)


def staircase_plot(title: str, lines: Mapping[str, Mapping[int, float]], path: Path) -> None:
    """Milliseconds over width, one line per kernel family, each relative to its first width."""
    figure = _figure(8, 4.5)
    axes = figure.add_subplot()
    for family, times in lines.items():
        widths = sorted(times)
        axes.plot(widths, [times[w] / times[widths[0]] for w in widths], marker="o", label=family)
    axes.set_xlabel("channels")
    axes.set_ylabel("time, relative to the narrowest")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left")
    figure.savefig(path, format="png", dpi=120)


def axes_plot(report: RunReport, path: Path) -> None:
    """Kept channels of every axis beside its size."""
    shown = [a for a in report.axes if a.frozen is None] or list(report.axes)
    figure = _figure(9, max(2.5, 0.24 * len(shown) + 1))
    axes = figure.add_subplot()
    names = [a.name for a in shown]
    axes.barh(names, [a.size for a in shown], color=BASE, alpha=0.4, label="before")
    axes.barh(names, [a.kept for a in shown], color=PRUNED, label="kept")
    axes.invert_yaxis()
    axes.set_xlabel("channels")
    axes.tick_params(axis="y", labelsize=7)
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=110)


def layers_plot(report: RunReport, path: Path) -> None:
    """Profiled time of the slowest operators before and after."""
    ordered = sorted(report.layers, key=lambda x: -x.most_ms)[:30]
    figure = _figure(9, max(2.5, 0.3 * len(ordered) + 1))
    axes = figure.add_subplot()
    rows = range(len(ordered))
    before = [x.before_ms or 0 for x in ordered]
    after = [x.after_ms or 0 for x in ordered]
    axes.barh([r - 0.2 for r in rows], before, height=0.4, color=BASE, label="baseline")
    axes.barh([r + 0.2 for r in rows], after, height=0.4, color=PRUNED, label="pruned")
    axes.set_yticks(list(rows), [x.name[-48:] for x in ordered], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("profiled time (ms)")
    axes.legend(loc="lower right")
    figure.savefig(path, format="png", dpi=110)
