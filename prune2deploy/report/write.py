"""Write every rendering of a report into a run directory, and read reports back.

In: a report and an opened run directory. Out: ``report.json``, ``report.csv``, ``report.html``
and the plots as files, each whole or not there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from prune2deploy.errors import ConfigError
from prune2deploy.report import html, plots, text
from prune2deploy.report.content import RunReport, SweepReport, from_json, to_json
from prune2deploy.rundir import RunDir

JSON, CSV, HTML = "report.json", "report.csv", "report.html"


def write(report: RunReport | SweepReport, run: RunDir) -> None:
    """Render ``report`` into ``run``."""
    run.write_text(JSON, to_json(report))
    if isinstance(report, SweepReport):
        run.write_text(CSV, text.sweep_csv(report))
        run.write_text(HTML, html.sweep_page(report))
        _plot(run, "latency.png", lambda path: plots.sweep_plot(report, path))
        return
    run.write_text(CSV, text.run_csv(report))
    run.write_text(HTML, html.run_page(report))
    _plot(run, "axes.png", lambda path: plots.axes_plot(report, path))
    if report.layers:
        _plot(run, "layers.png", lambda path: plots.layers_plot(report, path))


def _plot(run: RunDir, name: str, draw: Callable[[Path], None]) -> None:
    with run.place(name) as temporary:
        draw(temporary)


def show(report: RunReport | SweepReport) -> str:
    """The report as text for a terminal."""
    if isinstance(report, SweepReport):
        return text.sweep_text(report)
    return text.run_text(report)


def load(path: Path) -> RunReport | SweepReport:
    """Read the report of a run directory.

    Raises:
        ConfigError: ``path`` holds none.
    """
    file = path / JSON
    if not file.is_file():
        raise ConfigError(
            f"{path}: found no {JSON}, expected the folder of a finished run or sweep"
        )
    return from_json(file.read_bytes(), file)


def endings(paths: Sequence[Path]) -> list[str]:
    """The shortest ending of each path that no other has: its name, or more where names repeat.

    Raises:
        ConfigError: Two paths are of one folder.
    """
    parts = [path.resolve().parts for path in paths]
    twice = [str(path) for path, own in zip(paths, parts, strict=True) if parts.count(own) > 1]
    if twice:
        raise ConfigError(
            f"found {' and '.join(twice)}, which are one folder, expected different runs"
        )

    def ending(own: tuple[str, ...]) -> str:
        for length in range(1, len(own)):
            if sum(other[-length:] == own[-length:] for other in parts) == 1:
                return str(PurePath(*own[-length:]))
        return str(PurePath(*own))

    return [ending(own) for own in parts]


def comparable(paths: Sequence[Path]) -> list[tuple[str, RunReport]]:
    """Read several runs for a comparison, each with a name of its own.

    Raises:
        ConfigError: One of them is a sweep or named twice, or they were measured on different
            machines.
    """
    found = []
    for path, name in zip(paths, endings(paths), strict=True):
        report = load(path)
        if not isinstance(report, RunReport):
            raise ConfigError(
                f"{path}: found a sweep, expected runs, which alone are compared; show the sweep "
                f"by itself (prune2deploy report {path}): its table has the latency at each ratio, "
                "to be held against that of a run"
            )
        found.append((name, report))
    machines = {report.environment.get("machine", "") for _, report in found}
    if len(machines) > 1:
        raise ConfigError(
            f"these runs were measured on different machines ({'; '.join(sorted(machines))}); "
            "latencies compare only on one: name runs of the same machine"
        )
    return found
