"""Write every rendering of a report into a run directory, and read reports back.

In: a report and an opened run directory. Out: ``report.json``, ``report.csv``, ``report.html``
and the plots as files, each whole or not there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path, PurePath

from prune2deploy.errors import ConfigError
from prune2deploy.report import html, plots, text
from prune2deploy.report.content import RunReport, SweepReport, from_json, to_json
from prune2deploy.rundir import RunDir

JSON, CSV, HTML = "report.json", "report.csv", "report.html"


def write(report: RunReport | SweepReport, run: RunDir) -> tuple[str, ...]:
    """Render ``report`` into ``run``; return the names of the files."""
    drawn: dict[str, Callable[[Path], None]]
    if isinstance(report, SweepReport):
        texts = {CSV: text.sweep_csv(report), HTML: html.sweep_page(report)}
        drawn = {"latency.png": functools.partial(plots.sweep_plot, report)}
    else:
        texts = {CSV: text.run_csv(report), HTML: html.run_page(report)}
        drawn = {"axes.png": functools.partial(plots.axes_plot, report)}
        if report.layers:
            drawn["layers.png"] = functools.partial(plots.layers_plot, report)
    texts[JSON] = to_json(report)
    for name, said in texts.items():
        run.write_text(name, said)
    for name, draw in drawn.items():
        with run.place(name) as temporary:
            draw(temporary)
    return (*texts, *drawn)


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
