"""Run a measurement in a fresh process of its own, and leave nothing of it behind.

In: a specification in plain values. Out: the result that the child reports. The child writes one
JSON document per line: a heartbeat, its result, or an error that is raised again here. It ends when
this process does, however that ends (see ``watched``).
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from prune2deploy import errors, watched
from prune2deploy.errors import MeasureError, Prune2DeployError


def run(
    spec: Mapping[str, Any],
    seconds: float,
    module: str = "prune2deploy.measure.worker",
) -> dict[str, Any]:
    """Start a worker module on ``spec`` and wait for its result.

    Args:
        spec: What the worker is to do (see there); ``threads`` limits the libraries' thread pools.
        seconds: How long the child may be silent; it is killed beyond that.
        module: What to run as the worker.

    Raises:
        Prune2DeployError: What the child raised.
        MeasureError: It crashed, or was silent for too long.
    """
    with tempfile.TemporaryDirectory(prefix="prune2deploy-measure-") as folder:
        path = Path(folder) / "spec.json"
        path.write_text(json.dumps(spec), encoding="utf-8")
        with (Path(folder) / "stderr").open("w+b") as log:
            process = subprocess.Popen(
                watched.command(module, path),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=folder,
                env=_environment(int(spec.get("threads", 0))),
                start_new_session=True,
            )
            try:
                result = _listen(process, seconds)
            finally:
                _end(process)
            if result is None:
                log.seek(0)
                raise MeasureError(_crash_message(process.returncode, spec, log.read()))
    return result


def _environment(threads: int) -> dict[str, str]:
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS") if threads else ()
    return watched.environment() | dict.fromkeys(names, str(threads))


def _listen(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """Return the result; ``None`` when the child ended without one."""
    assert process.stdout is not None
    lines: queue.Queue[bytes | None] = queue.Queue()
    threading.Thread(target=_read, args=(process.stdout, lines), daemon=True).start()
    deadline = time.monotonic() + seconds
    while True:
        try:
            line = lines.get(timeout=max(0.01, deadline - time.monotonic()))
        except queue.Empty:
            raise MeasureError(
                f"the measuring process got no further within {seconds:.0f} s and was killed; "
                "raise max_seconds in the target's [measure], or free the machine"
            ) from None
        if line is None:
            process.wait()
            return None
        message = _message(line)
        if "error" in message:
            raise _error(message)
        if "result" in message:
            return dict(message["result"])
        if "alive" in message:
            deadline = time.monotonic() + seconds


def _read(stream: IO[bytes], lines: queue.Queue[bytes | None]) -> None:
    for line in stream:
        lines.put(line)
    lines.put(None)


def _message(line: bytes) -> dict[str, Any]:
    """Parse one line; what a library printed is not a message."""
    try:
        message = json.loads(line)
    except ValueError:
        return {}
    return message if isinstance(message, dict) else {}


def _error(message: Mapping[str, Any]) -> Prune2DeployError:
    kinds: dict[str, type[Prune2DeployError]] = {
        name: kind
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Prune2DeployError)
    }
    return kinds.get(str(message["error"]), MeasureError)(message["message"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill the child's process group, which holds what it started too, and collect its status.

    A surviving grandchild would keep the child's standard output open, and the reader would wait
    on it for ever.
    """
    with contextlib.suppress(ProcessLookupError):  # the whole group has ended already
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            stream.close()


def _crash_message(code: int, spec: Mapping[str, Any], log: bytes) -> str:
    cause = f"ended with status {code}"
    if code < 0:
        cause = f"was killed by {signal.Signals(-code).name}"
    paths = ", ".join(str(e["path"]) for e in spec.get("engines", ()))
    tail = log.decode(errors="replace").strip().splitlines()[-12:]
    return (
        f"the process that measured {paths} {cause}. A segmentation fault is the runtime's or its "
        "driver's; SIGKILL is usually a lack of memory. Its last words:\n  "
        + "\n  ".join(tail or ["(none)"])
    )
