"""The run directory: artefacts, manifest, lock, and the rules for going on with a run.

In: a folder and what identifies the run. Out: a :class:`RunDir` that places files under a
temporary name and renames them, so that a file that is there is whole. One process at a time
holds a run directory (an advisory lock that dies with the process). A folder whose run ended before
its first finished step holds nothing worth keeping, and any run may take it over.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import itertools
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from typing_extensions import Self

from prune2deploy import atomic
from prune2deploy.errors import ConfigError
from prune2deploy.journal import Journal

SCHEMA = 1  # 1: the keys listed in KEYS
KEYS = (
    "schema", "met", "verdict", "budget_ms", "speedup", "builds", "seconds", "threads",
    "target", "host", "baseline", "final", "parity", "artefacts",
)  # fmt: skip
MANIFEST = "manifest.json"
JOURNAL = "journal.jsonl"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
IDENTITY = "run.json"
LOCK = ".lock"
WORK = "builds"  # engines of every build; only what the manifest lists outlives the run
PARTIAL = ".part-"  # what ``atomic`` calls its temporary folders
_BEGUN = frozenset({JOURNAL, IDENTITY, LOCK, WORK})  # of a run before its first finished step


@dataclass(frozen=True)
class Artefact:
    """A finished file of a run: path relative to the run directory, size and content hash."""

    path: str
    bytes: int
    sha256: str


class RunDir:
    """An opened run directory; use it as a context manager, which tells of a full disk.

    Args:
        path: The folder; made when it is not there.
        identity: Plain values that must agree for one run to go on from another.
        resume: Go on from what the folder holds.

    Attributes:
        path: The folder.
        journal: Every finished step.
        begun: Whether it held finished steps of this run when it was opened.

    Raises:
        ConfigError: The folder cannot be written, holds something else, holds another run, or
            is in use by another process.
    """

    def __init__(self, path: Path, identity: Mapping[str, object], *, resume: bool = False) -> None:
        self.path = path.resolve()
        with writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            ours = _check_contents(self.path)
            self._lock = (self.path / LOCK).open("a")
        if not _locked(self._lock):
            self._lock.close()
            raise ConfigError(
                f"{path}: found a run in progress there, expected a free folder; "
                "wait for it to end or choose another --out"
            )
        try:
            self.journal = Journal(self.path / JOURNAL)
            self.begun = not ours or self.journal.started
            self._start(identity, resume=resume)
        except BaseException:
            self._lock.close()
            raise

    def _start(self, identity: Mapping[str, object], *, resume: bool) -> None:
        if self.begun:
            _check_identity(self.path, identity, resume=resume)
        else:
            _remove(self.path / WORK)
            self.write_text(IDENTITY, json.dumps(identity, indent=2, sort_keys=True) + "\n")
        for left in [*self.path.rglob(f"{PARTIAL}*")]:
            _remove(left)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._lock.close()
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            raise explain(error, Path(error.filename or self.path)) from error

    def __truediv__(self, name: str) -> Path:
        return self.path / name

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Path]:
        """Give a temporary path; what is written there is renamed to ``name`` on leaving.

        On an exception nothing named ``name`` is left behind or changed.
        """
        final = self.path / name
        with writing(final), atomic.replacing(final) as temporary:
            yield temporary
            for written in temporary.parent.iterdir():
                _flush(written)

    def write_text(self, name: str, text: str) -> Path:
        """Write a text file whole or not at all."""
        with self.place(name) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return self.path / name

    def discard(self, *names: str) -> None:
        """Remove finished files that are there."""
        for name in names:
            with writing(self.path / name):
                _remove(self.path / name)

    def artefacts(self) -> tuple[Artefact, ...]:
        """Every finished file of the run except the manifest, the lock and the working files."""
        found = []
        for path in sorted(self.path.rglob("*")):
            name = path.relative_to(self.path)
            if path.is_file() and name.parts[0] not in (MANIFEST, LOCK, WORK):
                found.append(self._artefact(name.as_posix()))
        return tuple(found)

    def _artefact(self, name: str) -> Artefact:
        path = self.path / name
        return Artefact(name, path.stat().st_size, atomic.sha256(path))

    def finish(self, facts: Mapping[str, object]) -> dict[str, object]:
        """Write the manifest from ``facts`` (every key of ``KEYS`` but the two added here)."""
        listed = [vars(artefact) for artefact in self.artefacts()]
        manifest = {"schema": SCHEMA, **facts, "artefacts": listed}
        missing = [key for key in KEYS if key not in manifest]
        assert not missing, f"the manifest lacks {missing}"
        self._write_manifest(manifest)
        return manifest

    def relist(self, names: Iterable[str]) -> None:
        """Take files that were written anew into the manifest, if there is one.

        Its other entries stay, so that they still tell whether their files are what they were.
        """
        if not (self.path / MANIFEST).exists():
            return
        manifest: dict[str, Any] = read_manifest(self.path)
        listed = {entry["path"]: entry for entry in manifest["artefacts"]}
        listed |= {name: vars(self._artefact(name)) for name in names}
        self._write_manifest({**manifest, "artefacts": [listed[name] for name in sorted(listed)]})

    def _write_manifest(self, manifest: Mapping[str, object]) -> None:
        self.write_text(MANIFEST, json.dumps(manifest, indent=2, allow_nan=False) + "\n")

    def clear_work(self) -> None:
        """Remove the working files; called once all else is written."""
        _remove(self.path / WORK)


def read_manifest(path: Path) -> dict[str, object]:
    """Read the manifest of a finished run.

    Raises:
        ConfigError: There is none, or another version wrote it.
    """
    file = path / MANIFEST
    if not file.is_file():
        raise ConfigError(f"{path}: found no {MANIFEST}, expected the folder of a finished run")
    try:
        manifest = json.loads(file.read_text("utf-8"))
        schema = manifest["schema"]
        if schema == SCHEMA:
            _ = [entry["path"] for entry in manifest["artefacts"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{file}: not a manifest ({error!r}); run again") from error
    if schema != SCHEMA:
        raise ConfigError(f"{file}: found manifest schema {schema!r}, expected {SCHEMA}")
    return dict(manifest)


def run_folder(name: str, identity: Mapping[str, object], *, resume: bool) -> Path:
    """Where a run goes that names no folder: a new one in ``runs``, or that of the same run."""
    parent = Path("runs")
    return latest_name(parent, name, identity) if resume else free_name(parent, name)


def free_name(parent: Path, name: str) -> Path:
    """Return the first of ``parent/name``, ``name-2``, ``name-3`` ... that a run may take."""
    return next(path for path in _names(parent, name) if _vacant(path))


def latest_name(parent: Path, name: str, identity: Mapping[str, object]) -> Path:
    """Return the newest of ``name``, ``name-2`` ... that holds the run of ``identity``.

    Where none does, the newest that is there: it tells what differs when it is opened.
    """
    numbered = re.compile(rf"{re.escape(name)}(?:-(\d+))?")
    found = [(numbered.fullmatch(path.name), path) for path in parent.glob(f"{glob.escape(name)}*")]
    there = [path for _, path in sorted((int(m[1] or 1), path) for m, path in found if m)]
    same = [path for path in there if not _differing(path, identity)]
    return (same or there or [parent / name])[-1]


def _names(parent: Path, name: str) -> Iterator[Path]:
    yield parent / name
    yield from (parent / f"{name}-{number}" for number in itertools.count(2))


def _vacant(path: Path) -> bool:
    """Whether ``path`` is not there, or holds a run that ended before its first finished step."""
    if not path.exists():
        return True
    if not path.is_dir() or not _ours(path):
        return False
    with (path / LOCK).open("a") as lock:
        return _locked(lock) and not Journal(path / JOURNAL).started


def _locked(file: IO[str]) -> bool:
    """Take the advisory lock; False where another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of the system while ``path`` is written into errors that a user can act on."""
    try:
        yield
    except OSError as error:
        raise explain(error, path) from error


def explain(error: OSError, path: Path) -> ConfigError:
    """Say what a failed write means and what to do."""
    if error.errno in DISK_FULL:
        return ConfigError(
            f"{path}: the disk is full; nothing half-written is kept: free some space, then "
            "repeat the command (run and sweep go on where they were with --resume)"
        )
    return ConfigError(
        f"{path}: cannot be written ({error.strerror or error}); expected a folder that you may "
        "write to: choose another with --out"
    )


def _flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Nested values by dotted keys, so that a difference names the one that differs."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            found |= {f"{key}.{name}": one for name, one in _flat(value).items()}
        else:
            found[key] = value
    return found


def _check_contents(path: Path) -> bool:
    """Whether a folder is empty or holds only what a run leaves before its first finished step."""
    names = _named(path)
    if not names - {LOCK}:
        return True
    if IDENTITY not in names:
        raise ConfigError(
            f"{path}: found files that are no run ({', '.join(sorted(names)[:3])} ...), "
            "expected an empty folder, a new name or a run; choose another --out"
        )
    return _ours(path)


def _ours(path: Path) -> bool:
    return {IDENTITY, LOCK} <= _named(path) <= _BEGUN


def _named(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir() if not entry.name.startswith(PARTIAL)}


def _differing(path: Path, identity: Mapping[str, object]) -> tuple[str, ...]:
    """What the run in ``path`` and that of ``identity`` differ in, in words."""
    held = path / IDENTITY
    if not held.is_file():
        return ("no run there",)
    try:
        before = _flat(json.loads(held.read_text("utf-8")))
    except (ValueError, AttributeError) as error:
        raise ConfigError(f"{held}: not of a run ({error}); choose another --out") from error
    now = _flat(json.loads(json.dumps(identity)))
    keys = [key for key in sorted({*before, *now}) if before.get(key) != now.get(key)]
    return tuple(f"{k}: {before.get(k)!r} there, {now.get(k)!r} here" for k in keys)


def _check_identity(path: Path, identity: Mapping[str, object], *, resume: bool) -> None:
    differing = "; ".join(_differing(path, identity))
    if differing:
        raise ConfigError(f"{path}: holds another run ({differing}); choose another --out")
    if not resume:
        raise ConfigError(
            f"{path}: holds this run already; go on with --resume or choose another --out"
        )


def _flush(path: Path) -> None:
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
