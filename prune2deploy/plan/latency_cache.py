"""Timings kept between runs, in one SQLite file.

In: points (signature, work, nanoseconds) and whole builds, each of one device, runtime, precision
and thread count. Out: the same again, for another budget or a related model on that device. Several
processes may use the file at once. Of several timings of the same work only the least is kept,
since contention only ever adds.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Graph
from prune2deploy.plan.costs import Point
from prune2deploy.plan.latency_model import Build
from prune2deploy.timing import OperatorTiming

SCHEMA = 1  # 1: cells and builds by context

_TABLES = """
CREATE TABLE IF NOT EXISTS cells (
    context TEXT, kind TEXT, signature TEXT, macs REAL, read REAL, written REAL, ns REAL,
    PRIMARY KEY (context, kind, signature, macs, read, written));
CREATE TABLE IF NOT EXISTS builds (
    context TEXT, model TEXT, counts TEXT, profile TEXT, measured_ms REAL,
    PRIMARY KEY (context, model, counts));
CREATE TABLE IF NOT EXISTS steps (
    context TEXT, family TEXT, staircase TEXT, PRIMARY KEY (context, family));
"""
_BUSY_SECONDS = 30.0


class DamagedCacheError(ConfigError):
    """The file is there but is no cache of this schema; it may be set aside and made again."""


@dataclass(frozen=True)
class Context:
    """What timings must have in common to be comparable.

    Attributes:
        device: Fingerprint of the device.
        runtime: Name and version of the runtime.
        precision: ``fp32``, ``fp16`` or ``int8``.
        threads: Intra-operator threads.
    """

    device: str
    runtime: str
    precision: str
    threads: int

    @property
    def key(self) -> str:
        """Hash that rows are addressed by."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()


def model_key(graph: Graph) -> str:
    """Hash of a traced model: its axes, operators, and the shapes of its layers."""
    layers = [(y.operator, repr(y.in_width), repr(y.out_width), repr(y.macs)) for y in graph.layers]
    axes = [(axis.name, axis.size, axis.tie) for axis in graph.axes]
    return hashlib.sha256(json.dumps([axes, layers, graph.operators]).encode()).hexdigest()


class LatencyCache:
    """An SQLite file of timings. Use as ``with LatencyCache.open(path, context) as cache``."""

    def __init__(self, connection: sqlite3.Connection, context: Context) -> None:
        self._connection = connection
        self._key = context.key

    @classmethod
    @contextlib.contextmanager
    def open(cls, path: Path, context: Context) -> Iterator[LatencyCache]:
        """Open or create the file.

        Raises:
            DamagedCacheError: The file is not a cache of this schema.
            ConfigError: It cannot be written.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
        except (OSError, sqlite3.Error) as error:
            raise _unusable(path, error) from error
        try:
            _prepare(connection, path)
            yield cls(connection, context)
            connection.commit()
        except sqlite3.DatabaseError as error:
            raise _unusable(path, error) from error
        finally:
            connection.close()

    def add_points(self, points: Iterable[Point], multiple: int = 1) -> None:
        """Keep points; where a cell is known already, the lesser time stays.

        Args:
            points: Timings of operators.
            multiple: Channel block that their work is padded to: equal widths are other work
                where it differs.
        """
        self._connection.executemany(
            "INSERT INTO cells VALUES (?,?,?,?,?,?,?) "
            "ON CONFLICT DO UPDATE SET ns = min(ns, excluded.ns)",
            [(self._cells(multiple), p.kind, p.signature, *p.work, p.ns) for p in points],
        )

    def points(self, signatures: Iterable[str], multiple: int = 1) -> tuple[Point, ...]:
        """Every known cell of the given signatures whose work is padded to ``multiple``."""
        found = []
        for signature in sorted(set(signatures)):
            rows = self._connection.execute(
                "SELECT kind, macs, read, written, ns FROM cells "
                "WHERE context = ? AND signature = ? ORDER BY kind, macs, read, written",
                (self._cells(multiple), signature),
            )
            found += [Point(r[0], signature, (r[1], r[2], r[3]), r[4]) for r in rows]
        return tuple(found)

    def _cells(self, multiple: int) -> str:
        return f"{self._key}/{multiple}"

    def add_build(self, model: str, build: Build) -> None:
        """Keep a build of a model (``model_key``); a later one of the same counts replaces it."""
        profile = json.dumps([asdict(timing) for timing in build.profile])
        row = (self._key, model, _counts_text(build.counts), profile, build.measured_ms)
        self._connection.execute("INSERT OR REPLACE INTO builds VALUES (?,?,?,?,?)", row)

    def builds(self, model: str) -> tuple[Build, ...]:
        """Every known build of a model."""
        rows = self._connection.execute(
            "SELECT counts, profile, measured_ms FROM builds WHERE context = ? AND model = ? "
            "ORDER BY rowid",
            (self._key, model),
        ).fetchall()  # an open cursor would hold its lock while an error is dealt with
        return tuple(Build(json.loads(c), _profile(p), ms) for c, p, ms in rows)

    def check(self) -> None:
        """Read everything.

        Raises:
            ValueError: A row does not hold what was kept; so do KeyError and TypeError.
            DamagedCacheError: Raised by ``open`` where the file itself is damaged.
        """
        if (found := self._connection.execute("PRAGMA quick_check").fetchone()) != ("ok",):
            raise ValueError(f"damaged database: {found}")
        builds = self._connection.execute("SELECT counts, profile FROM builds").fetchall()
        steps = self._connection.execute("SELECT staircase FROM steps").fetchall()
        for counts, profile in builds:
            Build(json.loads(counts), _profile(profile))
        for (staircase,) in steps:
            json.loads(staircase)

    def add_staircase(self, family: str, staircase: Mapping[int, float]) -> None:
        """Keep a probed staircase: width to nanoseconds, of one kernel family."""
        text = json.dumps({str(width): ns for width, ns in staircase.items()})
        row = (self._key, family, text)
        self._connection.execute("INSERT OR REPLACE INTO steps VALUES (?,?,?)", row)

    def staircase(self, family: str) -> dict[int, float] | None:
        """A probed staircase, or ``None`` where this device was not probed."""
        row = self._connection.execute(
            "SELECT staircase FROM steps WHERE context = ? AND family = ?", (self._key, family)
        ).fetchone()
        return {int(w): float(ns) for w, ns in json.loads(row[0]).items()} if row else None


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version not in (0, SCHEMA):
        raise DamagedCacheError(
            f"{path}: a latency cache of schema {version} found, {SCHEMA} expected; "
            "delete the file, it is made again"
        )
    connection.executescript(_TABLES)
    connection.execute(f"PRAGMA user_version = {SCHEMA}")


def _unusable(path: Path, error: Exception) -> ConfigError:
    busy = isinstance(error, (OSError, sqlite3.OperationalError))
    return (ConfigError if busy else DamagedCacheError)(
        f"{path}: not usable as a latency cache ({error}); expected an SQLite file that may be "
        "written, or none; delete the file or name another place"
    )


def _counts_text(counts: Mapping[str, int]) -> str:
    return json.dumps({name: int(kept) for name, kept in counts.items()}, sort_keys=True)


def _profile(text: str) -> tuple[OperatorTiming, ...]:
    return tuple(map(OperatorTiming.from_dict, json.loads(text)))
