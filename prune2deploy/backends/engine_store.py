"""Engines on disk: the manifest beside each, the cache, its lock, and the builder's process.

An engine is bound to the ONNX file, the runtime's version and the GPU that it was built for. The
manifest says which, so a stale or damaged engine is noticed before a runtime reads it. Whatever
is in the cache was written whole, under a lock, by one process.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from prune2deploy import watched
from prune2deploy.atomic import replacing, scratch, sha256, write_text
from prune2deploy.backends.engine_build import ANSWER, BuildRequest
from prune2deploy.errors import BackendError, BuildError

SCHEMA = 1  # 1: what Manifest holds
LOG_TAIL = 12  # lines of the builder's log that go into an error
POLL_SECONDS = 0.1
MEMORY_WORDS = ("bad_alloc", "outofmemory", "out of memory", "could not be allocated")


@dataclass(frozen=True)
class Manifest:
    """What an engine file was built from, with and for.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        version: Of that module.
        device: Name and compute capability of the GPU that the engine runs on.
        onnx_sha256: Of the ONNX file and its external weights.
        engine_sha256: Of the engine file.
        settings: Build settings that change the engine.
        seconds: Build time.
    """

    module: str
    version: str
    device: str
    onnx_sha256: str
    engine_sha256: str
    settings: Mapping[str, Any]
    seconds: float

    @property
    def key(self) -> str:
        """Cache key: all that decides the engine's contents."""
        facts = [self.module, self.version, self.device, self.onnx_sha256, dict(self.settings)]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]

    def write(self, engine: Path) -> None:
        """Write it beside ``engine``."""
        values = {"schema": SCHEMA, **asdict(self)}
        write_text(manifest_path(engine), json.dumps(values, indent=2))


def manifest_path(engine: Path) -> Path:
    """Where the manifest of an engine lies."""
    return engine.with_name(engine.name + ".json")


def read_manifest(engine: Path) -> Manifest:
    """Read the manifest of ``engine`` and check the engine file against it.

    Raises:
        BackendError: Either file is missing or damaged; says to build again.
    """
    again = "build it again: prune2deploy build MODEL.onnx --target TARGET"
    if not engine.is_file():
        raise BackendError(f"{engine}: no such engine; {again}")
    try:
        values = json.loads(manifest_path(engine).read_text())
        if values.pop("schema") != SCHEMA:
            raise BackendError(f"{manifest_path(engine)}: expected schema {SCHEMA}; {again}")
        manifest = Manifest(**values)
    except FileNotFoundError as error:
        raise BackendError(
            f"{engine}: there is no {manifest_path(engine).name} beside it, so it is unknown which "
            f"TensorRT and GPU it fits (engines of other tools are not taken); {again}"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise BackendError(f"{manifest_path(engine)}: damaged ({error}); {again}") from error
    if sha256(engine) != manifest.engine_sha256:
        raise BackendError(
            f"{engine}: corrupt: its contents are not those that were built "
            f"({engine.stat().st_size} bytes now); {again}"
        )
    return manifest


def check_fits(engine: Path, manifest: Manifest, *, module: str, version: str, device: str) -> None:
    """Raise BackendError unless the engine fits this runtime and this GPU."""
    pairs = (
        ("runtime", manifest.module, module),
        (f"{module} version", manifest.version, version),
        ("GPU", manifest.device, device),
    )
    for what, built, here in pairs:
        if built != here:
            raise BackendError(
                f"{engine}: built for {what} {built}, but here it is {here}; engines fit only what "
                "they were built for, build it again from its ONNX file"
            )


def text_key(text: str) -> str:
    """Short file-name-safe key of a text."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@contextmanager
def lock(path: Path, seconds: float) -> Iterator[None]:
    """Hold an exclusive lock on ``path`` between processes; it goes when its holder dies.

    Raises:
        BuildError: Another process held it for longer than ``seconds``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        deadline = time.monotonic() + seconds
        while not _try_lock(file.fileno()):
            if time.monotonic() > deadline:
                raise BuildError(
                    f"another process has been building this engine for {seconds:g} s "
                    f"(it holds {path}); wait for it, or end it"
                )
            time.sleep(POLL_SECONDS)
        yield


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def obtain(cache: Path, wanted: Manifest, request: BuildRequest, out: Path, seconds: float) -> Path:
    """Put the engine that ``wanted`` describes at ``out``, built unless the cache has a sound one.

    Args:
        cache: Folder of the cache.
        wanted: What is needed; its ``engine_sha256`` and ``seconds`` are not known yet.
        request: What to tell the builder; its ``engine`` is ignored.
        out: Where the engine goes, with its manifest and its log beside it.
        seconds: Time limit of the build and of waiting for another process's build.

    Returns:
        The engine in the cache, which other processes may drop from now on.

    Raises:
        BuildError: The build failed, crashed, or took too long; with the end of its log.
    """
    engine = cache / f"{wanted.key}.engine"
    with lock(_lock_path(engine), seconds):
        if sound(engine):
            os.utime(engine)  # the oldest unused ones are dropped first
        else:
            _build(engine, wanted, request, seconds)
        place(engine, out)
    return engine


def _build(engine: Path, wanted: Manifest, request: BuildRequest, seconds: float) -> None:
    with scratch(engine.parent) as folder:
        made = folder / engine.name
        answer = run_builder(replace(request, engine=str(made)), folder, seconds)
        manifest = replace(wanted, engine_sha256=sha256(made), seconds=answer["seconds"])
        timing = made.with_name("timing.bin")
        if timing.exists() and request.timing_cache:
            timing.replace(request.timing_cache)
        (folder / "build.log").replace(_log_path(engine))
        manifest.write(engine)
        made.replace(engine)


def sound(engine: Path) -> bool:
    """Whether an engine of the cache can be placed: it fits its manifest and has its log."""
    try:
        read_manifest(engine)
    except BackendError:
        return False
    return _log_path(engine).is_file()


def trim(cache: Path, limit_bytes: int, keep: Path) -> None:
    """Remove the longest unused engines until the cache holds at most ``limit_bytes``.

    Those that another process is building or placing stay, and so does ``keep``.
    """
    total = 0
    for engine, size in _by_last_use(cache):
        total += size
        if total > limit_bytes and engine != keep:
            _drop(engine)


def _by_last_use(cache: Path) -> list[tuple[Path, int]]:
    """Engines of the cache and their sizes, the last used first."""
    found = []
    for engine in cache.glob("*.engine"):
        with contextlib.suppress(FileNotFoundError):  # another process has dropped it
            facts = engine.stat()
            found.append((facts.st_mtime, engine, facts.st_size))
    return [(engine, size) for _, engine, size in sorted(found, reverse=True)]


def _drop(engine: Path) -> None:
    """Remove an engine of the cache, unless another process holds its lock."""
    with _lock_path(engine).open("w") as file:
        if _try_lock(file.fileno()):
            for path in (engine, manifest_path(engine), _log_path(engine)):
                path.unlink(missing_ok=True)


def _lock_path(engine: Path) -> Path:
    return engine.with_suffix(".lock")


def _log_path(engine: Path) -> Path:
    return engine.with_suffix(".log")


def place(engine: Path, out: Path) -> None:
    """Copy an engine of the cache, whose lock is held, with manifest and log to ``out``."""
    pairs = (
        (_log_path(engine), build_log(out)),
        (manifest_path(engine), manifest_path(out)),
        (engine, out),
    )
    for source, copy in pairs:
        with replacing(copy) as temporary:
            shutil.copyfile(source, temporary)


def build_log(engine: Path) -> Path:
    """Where the log of a placed engine lies."""
    return engine.with_suffix(".build.log")


def run_builder(request: BuildRequest, folder: Path, seconds: float) -> dict[str, Any]:
    """Run the builder's process in ``folder``; return its answer.

    Raises:
        BuildError: It failed, crashed, or took longer than ``seconds``; with its log's end.
    """
    order = folder / "request.json"
    order.write_text(request.to_json())
    log = folder / "build.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            command(order),
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            env=watched.environment() | {"PYTHONUNBUFFERED": "1"},
            start_new_session=True,
        )
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise BuildError(
                f"{request.onnx}: the build took longer than {seconds:g} s and was stopped; raise "
                f"build_seconds in the profile's [options]. Its log ends:\n{_tail(log)}"
            ) from error
        finally:
            _end(process)
    return _answer(request, code, folder / ANSWER, log)


def _answer(request: BuildRequest, code: int, answer: Path, log: Path) -> dict[str, Any]:
    """Read how the builder says it went, or raise what became of it."""
    if code < 0:
        name = signal.Signals(-code).name
        raise BuildError(
            f"{request.onnx}: the builder crashed ({name}). {_crash_hint(name)}"
            f" Its log ends:\n{_tail(log)}"
        )
    if not answer.is_file() or code not in (0, 1):
        raise BuildError(
            f"{request.onnx}: the builder ended with code {code} and no answer. "
            f"Its log ends:\n{_tail(log)}"
        )
    values: dict[str, Any] = json.loads(answer.read_text())
    if "error" in values:
        raise BuildError(f"{request.onnx}: {values['error']}{_memory_hint(values['error'])}")
    return values


def _memory_hint(error: str) -> str:
    if not any(word in error.lower() for word in MEMORY_WORDS):
        return ""
    return (
        "; there was not enough memory: free some, lower batch_max, or set workspace_mb in the "
        "profile's [options]"
    )


def command(order: Path) -> list[str]:
    """Command line of the builder's process."""
    return watched.command("prune2deploy.backends.engine_build", order)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Stop the builder and what it started, also when we are interrupted."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _crash_hint(name: str) -> str:
    if name == "SIGKILL":
        return "Something killed it, most often the system for want of memory."
    return "This is a fault of TensorRT, not of the model file; try another version of it."


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL:]
    return "\n".join(f"  {line[:300]}" for line in lines) or "  (empty)"
