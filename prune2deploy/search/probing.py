"""Probe the widths that a target runs well at, and show the staircase.

In: a usable target. Out: per kernel family the time of small models over their width and the step
found in it; as a table, a JSON document and a picture. What was probed stays in the cache of the
device, where later runs find their channel multiple.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prune2deploy import atomic, measure
from prune2deploy.backends.base import Backend, Session
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.errors import ConfigError
from prune2deploy.plan import alignment
from prune2deploy.plan.alignment import Staircase
from prune2deploy.plan.choices import leaving_choice
from prune2deploy.progress import Progress, Step
from prune2deploy.report import plots
from prune2deploy.report.text import table
from prune2deploy.rundir import writing
from prune2deploy.search.candidate import Workshop
from prune2deploy.search.recall import Timings
from prune2deploy.target import Target
from prune2deploy.units import NS_PER_MS

WARM_UP, RUNS = 10, 25


def probe(
    target: Target, backend: Backend, timings: Timings, progress: Progress
) -> tuple[Staircase, ...]:
    """Time the probe models of every kernel family; what the cache knows is not timed again.

    Raises:
        ConfigError: The runtime takes exported programs, and not the ONNX files of the probes.
        BackendError: A probe model could not be built or run.
    """
    if backend.takes_program:
        raise ConfigError(
            f"probing widths: found target {target.name!r}, whose runtime takes no ONNX file; "
            "expected one that does, such as ort. A run on it takes the width step that this "
            "machine's CPU is known to have, unless its profile names one (channel_multiple)"
        )
    with tempfile.TemporaryDirectory(prefix="prune2deploy-") as folder:

        def time_ns(path: Path) -> float:
            engine = backend.build(path, target, path.with_suffix(""))
            with backend.open(engine, target) as session:
                return least_ns(session)

        return alignment.probe_alignment(
            time_ns,
            Path(folder),
            store=timings,
            tell=lambda done, total: progress(Step("probing widths", done, total, unit="model")),
        )


def least_ns(session: Session) -> float:
    """Least time of some runs: contention only ever adds."""
    session.prepare(random_feeds(session.inputs, seed=0))
    for _ in range(WARM_UP):
        session.time_once()
    taken = [session.time_once() for _ in range(RUNS)]
    return float(min(one.device_ns or one.wall_ns for one in taken))


def multiple(
    target: Target, backend: Backend, timings: Timings, progress: Progress
) -> tuple[int, str]:
    """The width step to plan with, and where it is from.

    That of the profile counts where it names one. Else the device is probed, once: a result that
    is sure is kept in the cache. Without a cache, or where the runtime takes exported programs and
    not the ONNX files of the probes, it is what this machine's CPU is known to do.

    Raises:
        BackendError: A probe model could not be built or run.
    """
    if target.channel_multiple is not None:
        return target.channel_multiple, "given by the target profile"
    if not timings.kept or backend.takes_program:
        return measure.native_channel_multiple(), "detected on this machine"
    found = probe(target, backend, timings, progress)
    source = "probed on this device"
    if not all(one.sure for one in found):
        source += ", which was too disturbed to be sure"
    return alignment.channel_multiple(found), source


def settle(shop: Workshop, timings: Timings) -> tuple[int, str]:
    """The width step of a run, decided once, and where it is from; see ``multiple``.

    Where it keeps most of the model as it is, a finer one is taken.
    """

    def work() -> tuple[int, str]:
        step, source = multiple(shop.target, shop.backend, timings, shop.progress)
        finer = leaving_choice(shop.graph, step)
        if finer < step:
            source = f"{step}, {source}, leaves too little to prune"
        return finer, source

    return shop.run.journal.once("channel multiple", tuple[int, str], work)


def text(target: Target, found: Sequence[Staircase]) -> str:
    """The staircases as a table: milliseconds of the probe model at each width."""
    rows = [
        [str(width), *(f"{one.ns[i] / NS_PER_MS:.4f}" for one in found)]
        for i, width in enumerate(found[0].widths)
    ]
    rows.append(["step", *(str(one.step) for one in found)])
    rows.append(["cliff", *("yes" if one.cliff else "no" for one in found)])
    rows.append(["sure", *("yes" if one.sure else "no" for one in found)])
    return "\n".join(
        [
            f"{target.name}: least time in ms of small models by width",
            "",
            table(["width", *(one.family for one in found)], rows),
            "",
            f"channel multiple {alignment.channel_multiple(found)}: widths that are multiples of "
            "it waste nothing; a cliff means that widths off 4 leave the fast path; what is not "
            "sure hangs on one round of timing alone, and is probed again next time",
        ]
    )


def document(target: Target, found: Sequence[Staircase]) -> dict[str, Any]:
    """The same as plain values."""
    return {
        "schema": 1,
        "target": target.name,
        "channel_multiple": alignment.channel_multiple(found),
        "families": {
            one.family: {
                "widths": list(one.widths),
                "ns": list(one.ns),
                "step": one.step,
                "cliff": one.cliff,
            }
            for one in found
        },
    }


def write(target: Target, found: Sequence[Staircase], folder: Path) -> tuple[Path, Path]:
    """Write the staircases as JSON and as a picture.

    Raises:
        ConfigError: The folder cannot be written.
    """
    plain, picture = (folder / f"alignment-{target.name}.{kind}" for kind in ("json", "png"))
    lines = {one.family: dict(zip(one.widths, one.ns, strict=True)) for one in found}
    with writing(plain):
        atomic.write_text(plain, json.dumps(document(target, found), indent=2) + "\n")
        with atomic.replacing(picture) as path:
            plots.staircase_plot(f"{target.name}: time over width", lines, path)
    return plain, picture
