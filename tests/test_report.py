"""Every rendering says the same numbers, fetches nothing, and survives odd input."""

import csv
import io
import struct
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import pytest

from prune2deploy.errors import ConfigError
from prune2deploy.measure import LatencyStats
from prune2deploy.report import html, plots, svg, text, write
from prune2deploy.report.content import (
    AccuracyLine,
    AxisLine,
    BuildLine,
    LayerLine,
    Limits,
    ParityLine,
    Row,
    RunReport,
    SweepPoint,
    SweepReport,
    from_json,
    to_json,
)
from prune2deploy.rundir import RunDir

RUN = RunReport(
    model="net<1>",
    target="ort",
    met=True,
    verdict="met",
    budget_ms=10.0,
    speedup=1.53,
    builds=4,
    seconds=61.5,
    baseline=Row(15.1, 16.0, 17.0, (15.0, 15.2), 200, 11_000_000, 1_800_000_000, 44_000_000),
    final=Row(9.8, 10.4, 11.0, (9.7, 9.9), 210, 6_000_000, 1_000_000_000, 24_000_000),
    limits=Limits(2.5, 0.031, 0.2, 16, "detected"),
    parity=(ParityLine("torch to ONNX", 1e-6, 2e-6, 1e-3, "out", True),),
    axes=(
        AxisLine("conv1", 48, 64),
        AxisLine("odd", 47, 64, None, True),
        AxisLine("fc", 1000, 1000, "model output"),
    ),
    layers=(LayerLine("conv1", "Conv", 3.0, 2.0, 2.1), LayerLine("gone", "Conv", 1.0, None)),
    steps=(
        BuildLine(1, "probe", 7_000_000, 1_200_000_000),
        BuildLine(2, "correction", 6_000_000, 1_000_000_000, 9.7, 9.8, (9.7, 9.9), "met"),
    ),
    environment={"machine": "a cpu", "onnxruntime": "1.0"},
    notes=("scores are data-free",),
)
SWEEP = SweepReport(
    "net",
    "ort",
    16,
    15.0,
    tuple(
        SweepPoint(r, int(1e9 * (1 - r)), 1000, 15 * (1 - r), (14 * (1 - r), 16 * (1 - r)),
                   1 / (1 - r), (0.9 / (1 - r), 1.1 / (1 - r)))
        for r in (0.0, 0.25, 0.5)
    ),
    {"machine": "a cpu"},
)  # fmt: skip


class Page(HTMLParser):
    """Collects tags, what would be fetched, and whether every element is closed."""

    VOID = ("meta", "br", "img", "link", "input", "hr")

    def __init__(self, source):
        super().__init__()
        self.tags, self.open, self.fetched, self.text = [], [], [], []
        self.feed(source)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href", "xlink:href", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


PAGES = {
    "run": html.run_page(RUN),
    "sweep": html.sweep_page(SWEEP),
    "compare": html.compare_page([("a", RUN), ("b", RUN)]),
}


@pytest.mark.parametrize("page", PAGES.values(), ids=PAGES)
def test_pages_are_whole_and_fetch_nothing(page):
    parsed = Page(page)
    assert parsed.open == []
    assert parsed.fetched == []
    assert "script" not in parsed.tags
    assert "url(" not in page and "@import" not in page and "http" not in page
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page


def test_the_run_page_shows_what_was_traded():
    said = "".join(Page(PAGES["run"]).text)
    for fact in ("48 / 64", "model output", "Widths off that step: odd", "3.1%", "multiples of 16",
                 "a cpu", "2.5 ms", "scores are data-free"):  # fmt: skip
        assert fact in said
    assert "net<1>" in said  # escaped in the source, whole in the page
    assert "<1>" not in PAGES["run"]


def test_no_latency_stands_unlabelled():
    for source in (text.run_text(RUN), text.sweep_text(SWEEP), text.compare_text([("a", RUN)])):
        for line in source.splitlines():
            if "p50" in line:
                assert "measured p50" in line or "95 % interval of p50" in line


def test_high_percentiles_are_told_as_the_bounds_that_they_are():
    few = replace(RUN, percentile=99, judged_ms=11.0, final=replace(RUN.final, unbounded=(99,)))
    told = text.run_text(few)
    rows = {line.split(" (ms)")[0]: line for line in told.splitlines() if " (ms)" in line}
    assert rows["upper 95 % bound of p95"].split()[-3:] == ["16", "10.4", "-35.0%"]
    assert "17  11 (largest sample)" in rows["upper 95 % bound of p99"]
    assert "measured largest sample (too few bound p99) is 110.0% of it" in told
    enough = text.run_text(replace(few, final=RUN.final))
    assert "measured upper 95 % bound of p99 is 110.0% of it" in enough
    page = html.run_page(few)
    assert "upper 95 % bound of p95 (ms)" in page and "11 (largest sample)" in page
    assert from_json(to_json(few), Path("x")) == few
    latency = LatencyStats(9.8, 10.4, 11.0, (9.7, 9.9), 210, (99,))
    alone = text.alone_text(Path("a"), SimpleNamespace(latency=latency, control_ratio=1, flags=()))
    assert "upper 95 % bounds 10.4 ms for p95, 11 (largest sample) ms for p99" in alone


def test_blocks_that_went_are_told_with_a_reason_that_holds_for_caps_too():
    gone = text.run_text(replace(RUN, removed=("a", "b")))
    assert (
        "2 blocks taken out whole, because widths alone could not meet the budget or keep" in gone
    )
    assert "removed" not in text.run_text(RUN)


def test_a_share_that_is_not_known_is_not_told():
    unknown = replace(RUN, limits=replace(RUN.limits, fixed_share=None))
    assert "profiled time" in PAGES["run"] and "profiled time" not in html.run_page(unknown)
    assert from_json(to_json(unknown), Path("x")) == unknown


def test_the_floor_is_told_as_measured():
    assert "The smallest plan allowed measured 2.5 ms." in PAGES["run"]


@pytest.mark.parametrize("report", [RUN, SWEEP])
def test_json_comes_back_equal(report):
    assert from_json(to_json(report), Path("x")) == report


BAD = (b"", b"[]", b"{}", b'{"kind": "run", "schema": 1}', b"\xff\xfe{")


@pytest.mark.parametrize("bad", [*BAD, b'{"kind": "run", "schema": 1, "baseline": []}'])
def test_what_is_no_report_is_refused(tmp_path, bad):
    (tmp_path / "report.json").write_bytes(bad)
    with pytest.raises(ConfigError, match=r"report\.json: not a report"):
        write.load(tmp_path)


def test_csv_holds_the_numbers_unrounded():
    before, after = csv.DictReader(io.StringIO(text.run_csv(RUN)))
    assert (before["row"], float(before["p50_ms"])) == ("baseline", 15.1)
    assert float(after["ci95_high_ms"]) == 9.9
    assert int(after["macs"]) == 1_000_000_000
    rows = list(csv.DictReader(io.StringIO(text.sweep_csv(SWEEP))))
    assert [float(r["ratio"]) for r in rows] == [0.0, 0.25, 0.5]


@pytest.mark.parametrize(
    ("report", "drawn"), [(RUN, ["axes.png", "layers.png"]), (SWEEP, ["latency.png"])]
)
def test_a_run_directory_gets_every_rendering(tmp_path, report, drawn):
    with RunDir(tmp_path, {}) as run:
        write.write(report, run)
        listed = {a.path for a in run.artefacts()}
    assert listed == {"run.json", "report.json", "report.csv", "report.html", *drawn}
    for plot in drawn:
        data = (tmp_path / plot).read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 300 and height > 200
    assert write.load(tmp_path) == report


def test_no_plot_searches_for_a_place_of_its_legend(tmp_path, monkeypatch):
    """Where that takes long, on a slow device, matplotlib warns of it."""

    def search(*arguments):
        raise AssertionError("a legend looks for the best place")

    monkeypatch.setattr("matplotlib.legend.Legend._find_best_position", search)
    for number, draw in enumerate((plots.axes_plot, plots.layers_plot)):
        draw(RUN, tmp_path / f"{number}.png")
    plots.staircase_plot("widths", {"conv": {8: 1.0, 16: 2.0}}, tmp_path / "staircase.png")
    assert len(list(tmp_path.iterdir())) == 3


def test_runs_of_different_machines_are_not_compared(tmp_path):
    for name, machine in (("a", "one"), ("b", "two")):
        with RunDir(tmp_path / name, {}) as run:
            write.write(replace(RUN, layers=(), environment={"machine": machine}), run)
    assert len(write.comparable([tmp_path / "a"])) == 1
    with pytest.raises(ConfigError, match="different machines"):
        write.comparable([tmp_path / "a", tmp_path / "b"])


def test_runs_are_compared_by_names_that_tell_them_apart(tmp_path):
    paths = [tmp_path / name for name in ("p/run", "q/run", "p/x/run", "other")]
    for path in paths:
        with RunDir(path, {}) as run:
            write.write(replace(RUN, layers=()), run)
    names = [name for name, _ in write.comparable(paths)]
    assert names == ["p/run", "q/run", "x/run", "other"]
    found = write.comparable(paths)
    assert all(name in text.compare_text(found) and name in html.compare_page(found)
               for name in names)  # fmt: skip
    with pytest.raises(ConfigError, match="one folder"):
        write.comparable([paths[0], tmp_path / "q/../p/run"])


def test_a_sweep_among_runs_is_refused_with_the_line_that_shows_it(tmp_path):
    for name, report in (("a", replace(RUN, layers=())), ("b", SWEEP)):
        with RunDir(tmp_path / name, {}) as run:
            write.write(report, run)
    with pytest.raises(ConfigError, match=rf"found a sweep, .*prune2deploy report {tmp_path}/b"):
        write.comparable([tmp_path / "a", tmp_path / "b"])


def test_a_chart_of_one_point_and_a_bar_of_nothing_are_drawn():
    for at in (0.0, 0.5):
        chart = svg.line_chart([svg.Point(at, 1, 1, 1)], "x", "y")
        assert "polyline" in chart
        assert chart.count(f'text-anchor="middle">{at:.2g}</text>') == 1  # one tick of that name
    assert 'width="0.00"' in svg.bar(0, 0)


def test_parity_tells_the_figure_that_was_judged_and_when_accuracy_was():
    plain = ParityLine("a and b", 0.5, 0.3, 0.1, "scores", True, 0.04, "rms_rel")
    told = plain.text()
    assert "root mean square difference 0.04" in told and "tolerance 0.1)" in told
    assert "'scores'" in told and "accuracy" not in told
    by_accuracy = replace(plain, error=0.2).text()
    assert "accuracy decides" in by_accuracy
    older = ParityLine("a and b", 0.5, 0.3, 0.4, "scores", True)
    assert "largest difference 0.3" in older.text()


def test_what_is_predicted_is_called_so_once():
    report = replace(RUN, curve=((1.0, 0.1), (50.0, 0.9)))
    lines = [line for line in text.run_text(report).splitlines() if line.startswith("predicted")]
    assert lines
    assert all(line.count("predicted") == 1 for line in lines)


def test_what_more_time_buys_is_told_at_the_percentile_of_the_budget():
    """The curve is of medians: a budget of 20 ms for a p99 of twice the median is 10 ms of it."""
    median = replace(RUN, curve=((1.0, 0.1), (50.0, 0.9)))
    tail = replace(median, percentile=99, budget_ms=20.0, judged_ms=2 * RUN.final.p50_ms)
    told = text.gains(tail)
    assert "1 ms more would keep 26.3% instead of 24.7%" in text.gains(median)[-1]
    assert "2 ms more would keep 26.3% instead of 24.7%" in told[-1]


def test_accuracy_is_told_where_it_was_measured():
    scored = replace(RUN, accuracy=AccuracyLine(512, 0.897, 0.8821))
    told = text.run_text(scored)
    assert "top-1 on 512 samples of the data" in told
    assert all(part in told for part in ("89.7%", "88.2%", "-1.5 points"))
    assert from_json(to_json(scored), Path("report.json")) == scored
    assert "top-1" not in text.run_text(RUN)
