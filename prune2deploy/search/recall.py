"""The cache of what earlier runs measured on this device: where it is, reading it, adding to it.

In: a target, a traced model, and the builds of a run. Out: builds of earlier runs of the same
model, and timings of operators that other models share with it. Both replace probe builds.

Everything lies in one folder of the user's (``PRUNE2DEPLOY_CACHE``, else ``prune2deploy`` in
``XDG_CACHE_HOME`` or ``~/.cache``; ``off`` turns it off). Rows are addressed by their content: the
facts of the device, the runtime with its version and options, precision and threads. A run never
fails because of its cache: one that cannot be used is left alone, one that is damaged is renamed,
and a note says so.

Whole-model latencies are kept as multiples of the unpruned model's, measured interleaved: machines
change speed between two runs, the ratio does not.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from prune2deploy import measure, places
from prune2deploy.backends.base import Backend
from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Graph
from prune2deploy.plan.costs import Point
from prune2deploy.plan.latency_cache import Context, DamagedCacheError, LatencyCache, model_key
from prune2deploy.plan.latency_model import Build, points_of
from prune2deploy.target import Target

PLACE = "PRUNE2DEPLOY_CACHE"
OFF = "off"
FILE = "latency.sqlite"
LOSSES = "sensitivity"
RECALLED = 12  # builds of a model that a run starts from; later ones are nearer to what is wanted

T = TypeVar("T")

_IRRELEVANT = ("python",)  # of the fingerprint: no influence on an engine's latency


def folder() -> Path | None:
    """Where this user's cache lies; ``None`` where it is turned off."""
    given = os.environ.get(PLACE, "")
    if given == OFF:
        return None
    if given:
        return Path(given)
    return places.cache()


def context(target: Target, backend: Backend) -> Context:
    """What timings must have in common with those of ``target`` to be used for it."""
    facts = {k: v for k, v in measure.fingerprint().items() if k not in _IRRELEVANT}
    facts = {"simulated": True} if backend.simulated else facts
    device = {"device": target.device, **facts}
    runtime = [backend.name, backend.versions(), sorted(target.options)]
    return Context(
        json.dumps(device, sort_keys=True, default=str),
        json.dumps(runtime, sort_keys=True, default=str),
        target.precision,
        target.threads,
    )


def timings(target: Target, backend: Backend, *, cache: bool = True) -> Timings:
    """The user's cache for ``target``; with ``cache`` false one that holds and keeps nothing."""
    return Timings(folder() if cache else None, context(target, backend))


@dataclass(frozen=True)
class Recalled:
    """What earlier runs left for this one, as the journal keeps it.

    Attributes:
        builds: Builds of this model; ``measured_ms`` is a multiple of the unpruned model's.
        points: Timings of operators that this model shares with others.
    """

    builds: tuple[Build, ...] = ()
    points: tuple[Point, ...] = ()


class Timings:
    """The cache as one run sees it.

    Args:
        place: Folder of the cache, or ``None`` for none: nothing is then recalled or kept.
        here: What timings of this run have in common.

    Attributes:
        losses: Folder for measured losses (see ``worth``), or ``None``.
        notes: What a reader of the report should know of the cache.
    """

    def __init__(self, place: Path | None, here: Context) -> None:
        self._path = None if place is None else place / FILE
        self.losses = None if place is None else place / LOSSES
        self._here = here
        self.notes: list[str] = []

    @property
    def kept(self) -> bool:
        """Whether there is a cache at all."""
        return self._path is not None

    def builds(self, graph: Graph) -> tuple[Build, ...]:
        """The latest builds of this model; ``measured_ms`` is a multiple of the unpruned one's."""
        key = model_key(graph)
        none: tuple[Build, ...] = ()
        found = self._use(lambda cache: cache.builds(key), none)
        return tuple(build for build in found if build.counts)[-RECALLED:]

    def points(self, signatures: Iterable[str], multiple: int) -> tuple[Point, ...]:
        """Timings of operators with these signatures, padded to ``multiple``, from any model."""
        wanted = tuple(signatures)
        none: tuple[Point, ...] = ()
        return self._use(lambda cache: cache.points(wanted, multiple), none)

    def keep(self, graph: Graph, builds: Sequence[Build], whole_ms: float, multiple: int) -> None:
        """Keep builds of a run.

        Args:
            graph: The traced model.
            builds: With ``measured_ms`` in the unit of ``whole_ms``.
            whole_ms: Latency of the unpruned model.
            multiple: Channel multiple that the points are padded to.
        """
        if self._path is None:
            return
        key, points = model_key(graph), points_of(graph, builds, multiple=multiple)
        shares = [
            replace(b, measured_ms=None if b.measured_ms is None else b.measured_ms / whole_ms)
            for b in builds
        ]

        def write(cache: LatencyCache) -> None:
            cache.add_points(points, multiple)
            for build in shares:
                cache.add_build(key, build)

        self._use(write, None)

    def staircase(self, family: str) -> dict[int, float] | None:
        """The staircase of a kernel family, where this device was probed."""
        return self._use(lambda cache: cache.staircase(family), None)

    def add_staircase(self, family: str, staircase: Mapping[int, float]) -> None:
        """Keep the staircase of a kernel family."""
        self._use(lambda cache: cache.add_staircase(family, staircase), None)

    def _use(self, work: Callable[[LatencyCache], T], otherwise: T) -> T:
        """Do ``work`` on the opened cache; ``otherwise`` where there is none that can be used."""
        if self._path is None:
            return otherwise
        try:
            with LatencyCache.open(self._path, self._here) as cache:
                return work(cache)
        except (DamagedCacheError, ValueError, KeyError, TypeError) as error:
            self.notes.append(self._set_aside(self._path, error))
        except ConfigError as error:
            self._path = None
            self.notes.append(f"no timings of earlier runs were used or kept: {error}")
        return otherwise

    def _set_aside(self, path: Path, error: Exception) -> str:
        """Rename a damaged cache, or do without; returns what to tell the user."""
        try:
            return set_aside(path, self._here)
        except (OSError, ConfigError):
            self._path = None
            return f"{path}: damaged ({error}) and cannot be renamed; delete it"


def set_aside(path: Path, here: Context) -> str:
    """Rename a damaged cache, unless another process has done so; returns what to tell the user."""
    with path.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            with LatencyCache.open(path, here) as cache:
                cache.check()
        except (DamagedCacheError, ValueError, KeyError, TypeError):
            aside = _free(path)
            path.replace(aside)
            path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
            return f"the latency cache was damaged; it is now {aside}, and a new one is begun"
    return "the latency cache was damaged and has been replaced by another run"


def _free(path: Path) -> Path:
    number = 1
    while (aside := path.with_name(f"{path.name}.damaged-{number}")).exists():
        number += 1
    return aside
