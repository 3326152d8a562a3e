"""The child process that holds the engines, started through ``watched`` on a specification.

The specification has ``task`` (``"compare"`` or ``"profile"``), ``target`` (``Target.to_dict``),
``engines`` (path, onnx, backend of each: candidate, reference, which profiling may lack), and for
comparing ``raw`` (where the samples go) and ``goal`` (or null), for profiling ``runs``;
``scratch`` lists folders to remove should the parent be killed. Messages go to standard output, one
JSON document a line; ``ALIVE`` tells the parent that there is no reason to give up waiting.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from prune2deploy.backends import registry
from prune2deploy.backends.base import Backend, Engine
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.errors import Prune2DeployError
from prune2deploy.measure import samples
from prune2deploy.measure.deadline import Goal
from prune2deploy.measure.sample import interleaved
from prune2deploy.target import Target

ALIVE = {"alive": True}


def main(argv: list[str]) -> int:
    """Do what the specification asks; return the exit status."""
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints must not mix with the messages
    spec = json.loads(Path(argv[0]).read_text(encoding="utf-8"))

    def say(message: dict[str, Any]) -> None:
        try:
            channel.write(json.dumps(message) + "\n")
            channel.flush()
        except BrokenPipeError:  # nobody listens any more, and the watch is about to end this
            threading.Event().wait()

    try:
        say({"result": _TASKS[spec["task"]](spec, say)})
    except Prune2DeployError as error:
        say({"error": type(error).__name__, "message": str(error)})
        return error.exit_code
    return 0


def _context(spec: Mapping[str, Any]) -> tuple[Target, Backend, list[Engine]]:
    target = Target.from_dict(spec["target"])
    engines = [
        Engine(Path(e["path"]), Path(e["onnx"]), str(e["backend"]), 0.0, None, str(e["precision"]))
        for e in spec["engines"]
    ]
    return target, registry.for_target(target), engines


def _compare(spec: Mapping[str, Any], say: Any) -> dict[str, Any]:
    target, backend, (candidate, reference) = _context(spec)

    goal = None if spec["goal"] is None else Goal(**spec["goal"])
    taken = interleaved(
        backend,
        (candidate, reference),
        target,
        goal=goal,
        heartbeat=lambda: say(ALIVE),
    )
    samples.save(taken, Path(spec["raw"]))
    return {}


def _profile(spec: Mapping[str, Any], say: Any) -> dict[str, Any]:
    target, backend, (engine, *references) = _context(spec)
    with backend.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=0, onnx=engine.onnx)
        session.prepare(feeds)
        seconds = min(session.time_once().wall_ns for _ in range(2)) / 1e9  # the first may compile
    runs = affordable(int(spec["runs"]), seconds, target.measure.max_seconds)

    def around() -> list[float]:
        found = []
        for one in references:
            found.append(sum(t.ns for t in backend.profile(one, target, feeds, -(-runs // 2))))
            say(ALIVE)
        return found

    before = around()
    timings = backend.profile(engine, target, feeds, runs)
    say(ALIVE)
    return {
        "operators": [dataclasses.asdict(t) for t in timings],
        "reference_ns": [*before, *around()],
    }


def affordable(runs: int, seconds: float, limit: float) -> int:
    """How many of ``runs``, each of some seconds, fit into the limit; three at least."""
    return max(min(runs, 3), min(runs, int(limit / max(seconds, 1e-9))))


_TASKS = {"compare": _compare, "profile": _profile}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
