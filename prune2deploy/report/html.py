"""Self-contained pages: one file, no scripts, nothing fetched, light and dark, phone to desk.

In: the frozen values of ``content``. Out: HTML text.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from prune2deploy.report import svg
from prune2deploy.report.content import LayerLine, RunReport, SweepReport
from prune2deploy.report.tables import (
    Table,
    builds_table,
    compare_table,
    milliseconds,
    result_table,
    sweep_table,
)
from prune2deploy.report.text import gains, gap_text, removed_text

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1b1f24;--mute:#59636e;--line:#d5dae0;
--on:#1f6feb;--base:#8b96a3;--warn:#b35900;--good:#1a7f37;--bad:#cf222e}
@media(prefers-color-scheme:dark){:root{--bg:#0f1318;--fg:#e6eaef;--mute:#9aa5b1;--line:#2b323b;
--on:#58a6ff;--base:#6e7883;--warn:#e3a008;--good:#3fb950;--bad:#ff7b72}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:60rem;background:var(--bg);color:var(--fg);
font:16px/1.5 system-ui,sans-serif}
h1{font-size:1.4rem;margin:.5rem 0;overflow-wrap:anywhere}h2{font-size:1.1rem;margin:2rem 0 .5rem}
p{margin:.4rem 0}.mute{color:var(--mute)}.good{color:var(--good)}.bad{color:var(--bad)}
.warn{color:var(--warn)}.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.3rem .5rem;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;white-space:normal;overflow-wrap:anywhere;
min-width:8rem}
svg text{fill:var(--mute);font:12px system-ui,sans-serif}
.bar{display:block;width:100%;min-width:5rem;height:.7rem}.chart{width:100%;height:auto}
.off,.grid{fill:var(--line);stroke:var(--line)}.off{stroke:none}
rect.on{fill:var(--on)}rect.base{fill:var(--base)}rect.warn{fill:var(--warn)}
.line{fill:none;stroke:var(--on);stroke-width:2}.dot{fill:var(--on)}
.whisker{stroke:var(--fg);stroke-width:1.5}
"""
LAYERS_SHOWN = 60


def page(title: str, sections: Iterable[str]) -> str:
    """A whole document around ``sections``."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>\n"
        f"<h1>{escape(title)}</h1>\n{''.join(sections)}\n</body></html>\n"
    )


def html_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table that scrolls sideways on small screens; cells are HTML already."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{c}</td>" for c in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div>\n"
    )


def plain_table(table: Table) -> str:
    """The same of cells that are plain text."""
    return html_table(table.head, ([escape(cell) for cell in row] for row in table.rows))


def run_page(report: RunReport) -> str:
    """The report of one run."""
    title = f"{report.model} on {report.target}: {report.speedup:.2f}x, {report.verdict}"
    sections = [
        _result(report),
        _why(report),
        _curve(report),
        _axes(report),
        _layers(report),
        _steps(report),
    ]
    return page(title, [*sections, _environment(report.environment, report.notes)])


def _result(report: RunReport) -> str:
    mark = "good" if report.met else "bad"
    parity = "".join(f"<p>Parity {escape(line.text())}.</p>" for line in report.parity)
    return (
        f'<p class="{mark}"><strong>{escape(report.verdict)}</strong>: the budget is '
        f"{milliseconds(report.budget_ms)} ms; {report.filling()}. The model is "
        f"{report.speedup:.3f} times as fast as the baseline measured interleaved with it.</p>"
        + plain_table(result_table(report))
        + f"<p>{report.builds} engine builds besides the baseline, "
        f"{report.seconds:.0f} s in all.</p>{parity}"
    )


def _why(report: RunReport) -> str:
    limits = report.limits
    off = [axis.name for axis in report.axes if axis.off_step]
    floor = (
        f"The smallest plan allowed measured {milliseconds(limits.floor_ms)} ms. "
        if limits.floor_ms is not None
        else ""
    )
    fixed = (
        f"{limits.fixed_share:.1%} of the baseline's profiled time is what no width changes: "
        "operators without a prunable width, and what every call costs."
        if limits.fixed_share is not None
        else ""
    )
    outside = (
        f" {milliseconds(limits.overhead_ms)} ms of the baseline's undisturbed runs is spent "
        "outside operators."
        if limits.overhead_ms is not None
        else ""
    )
    memory = (
        f" {limits.memory_share:.1%} goes with elements read and written rather than with "
        "multiply-accumulates (by the latency model's fitted costs): it is bound by memory, and "
        "falls with the widths, not with their product."
        if limits.memory_share is not None
        else ""
    )
    widths = (
        f'<p class="warn">Widths off that step: {escape(", ".join(off))}.</p>'
        if off
        else "<p>No pruned width is off that step.</p>"
    )
    return (
        "<h2>What bounds the latency</h2>"
        f"<p>{floor}{fixed}{outside}{memory}</p>"
        f"<p>The target runs well at widths that are multiples of {limits.channel_multiple} "
        f"({escape(limits.multiple_source)}).</p>{widths}"
    )


def _curve(report: RunReport) -> str:
    if len(report.curve) < 2:
        return ""
    points = [svg.Point(at, 100 * worth, 100 * worth, 100 * worth) for at, worth in report.curve]
    told = "".join(
        f"<p>Predicted: {escape(line)}.</p>" for line in (*gains(report), *gap_text(report))
    )
    return (
        "<h2>What one more millisecond would buy, predicted</h2>"
        '<p class="mute">Retained worth of the best plan that the latency model allows at each '
        "latency: 0 % at the narrowest widths, 100 % at the full ones. No point of this curve "
        f"was built or measured.</p>{told}"
        + svg.line_chart(points, "predicted latency (ms)", "retained worth (%)")
    )


def _axes(report: RunReport) -> str:
    rows = [
        [
            escape(a.name),
            f"{a.kept} / {a.size}",
            svg.bar(a.kept, a.size, warn=a.off_step),
            f'<span class="mute">{escape(a.frozen)}</span>' if a.frozen else "",
        ]
        for a in report.axes
    ]
    blocks = f"<p>{escape(removed_text(report))}</p>" if report.removed else ""
    return f"<h2>What was traded: kept channels</h2>{blocks}" + html_table(
        ["axis", "kept", "", "kept because"], rows
    )


def _layers(report: RunReport) -> str:
    if not report.layers:
        return ""
    whole = max(x.most_ms for x in report.layers)
    ordered = sorted(report.layers, key=lambda x: -x.most_ms)
    rest = ordered[LAYERS_SHOWN:]
    note = (
        f'<p class="mute">{len(rest)} more, {sum(x.before_ms or 0 for x in rest):.3g} ms before '
        "and "
        f"{sum(x.after_ms or 0 for x in rest):.3g} ms after, are in report.json.</p>"
        if rest
        else ""
    )
    return (
        "<h2>Time of each operator, profiled</h2>"
        '<p class="mute">Minimum over the profiled runs; grey is the baseline.</p>'
        + html_table(
            ["operator", "kind", "before (ms)", "after (ms)", "predicted (ms)", ""],
            (_layer(x, whole) for x in ordered[:LAYERS_SHOWN]),
        )
        + note
    )


def _layer(line: LayerLine, whole: float) -> list[str]:
    times = (line.before_ms, line.after_ms, line.predicted_ms)
    shown = ["" if t is None else f"{t:.3f}" for t in times]
    bars = svg.pair(line.before_ms or 0, line.after_ms or 0, whole)
    return [escape(line.name), escape(line.kind), *shown, bars]


def _steps(report: RunReport) -> str:
    return "<h2>Builds</h2>" + plain_table(builds_table(report))


def _environment(facts: Mapping[str, str], notes: Sequence[str]) -> str:
    said = "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f"<h2>Environment</h2>{said}" + plain_table(
        Table(["", ""], [[*fact] for fact in facts.items()])
    )


def sweep_page(report: SweepReport) -> str:
    """The report of one sweep: two charts and the table."""
    latency = [svg.Point(p.ratio, p.p50_ms, *p.ci95_ms) for p in report.points]
    speedup = [svg.Point(p.ratio, p.speedup, *p.speedup_ci95) for p in report.points]
    label = "fraction of channels removed"
    return page(
        f"{report.model} on {report.target}: latency against pruning ratio",
        [
            f"<p>Every axis pruned by the same fraction, widths rounded to multiples of "
            f"{report.channel_multiple}, each model measured interleaved with the unpruned one "
            f"({milliseconds(report.baseline_ms)} ms).</p>",
            svg.line_chart(latency, label, "measured p50 (ms)"),
            svg.line_chart(speedup, label, "measured speed-up"),
            plain_table(sweep_table(report)),
            _environment(report.environment, report.notes),
        ],
    )


def compare_page(reports: Sequence[tuple[str, RunReport]]) -> str:
    """Several runs in one table."""
    return page("Runs compared", [plain_table(compare_table(reports))])
