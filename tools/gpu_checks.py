"""Everything that needs an NVIDIA GPU, in one go: build, run, time, profile, refuse.

    python tools/gpu_checks.py [--target trt] [--out gpu_checks.json]

Writes a JSON file with the date, the machine's fingerprint and one entry per check, so that the
result can be kept in the docs. Ends with 0 if all checks passed, 1 if one failed, and 3, after
saying what is missing, on a machine without a GPU or without the target's library.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prune2deploy import export, parity, precision, simplify
from prune2deploy import target as targets
from prune2deploy.atomic import write_text
from prune2deploy.backends import engine_store, gpu_driver, gpu_memory, registry
from prune2deploy.backends.base import Backend, Engine
from prune2deploy.backends.tensorrt import device_index
from prune2deploy.backends.tensorrt_session import TensorRtSession
from prune2deploy.errors import BackendError, Prune2DeployError
from prune2deploy.target import Target

SCHEMA = 1  # 1: date, host, versions, target, checks
SAMPLES = 50
SIZE = 128


class Net(nn.Module):
    """A residual net that is large enough to time and small enough to build in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(64, 64, 3, 1, 1) for _ in range(6)])
        self.head = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (N, 3, H, W) into (N, 100)."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + 0.1 * block(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class Bench:
    """The files, the target and the backend that all checks share."""

    def __init__(self, folder: Path, target: Target) -> None:
        torch.manual_seed(0)
        options = {**dict(target.options), "cache": str(folder / "cache")}
        options.pop("compute_capability", None)  # for the GPU that is here
        self.folder = folder
        self.target = replace(target, options=tuple(options.items()))
        self.backend: Backend = registry.for_target(self.target)
        self.example = torch.randn(1, 3, SIZE, SIZE)
        raw = export.to_onnx(Net(), (self.example,), folder / "raw.onnx")
        self.onnx = {"fp32": simplify.simplify(raw, folder / "fp32.onnx").path}
        rows = [((torch.randn(1, 3, SIZE, SIZE),), None) for _ in range(8)]
        self.onnx["fp16"] = precision.to_fp16(self.onnx["fp32"], folder / "fp16.onnx").path
        self.onnx["int8"] = precision.to_int8(self.onnx["fp32"], folder / "int8.onnx", rows).path

    def with_options(self, **changed: Any) -> Target:
        """The target with some options changed."""
        return replace(self.target, options=tuple({**dict(self.target.options), **changed}.items()))

    def feeds(self) -> dict[str, Any]:
        """The example as the engine's input."""
        return parity.as_sample((self.example,))

    def build(self, kind: str, target: Target | None = None) -> Engine:
        """The engine of one precision."""
        return self.backend.build(
            self.onnx[kind], target or self.target, self.folder / "out" / kind
        )

    def open(self, engine: Engine, target: Target | None = None) -> TensorRtSession:
        """Open an engine for running."""
        session = self.backend.open(engine, target or self.target)
        assert isinstance(session, TensorRtSession)
        return session


def check_precision(bench: Bench, kind: str) -> dict[str, Any]:
    """Build, compare with ONNX Runtime, time with and without a graph, and profile."""
    engine = bench.build(kind)
    feeds = bench.feeds()
    with bench.open(engine) as session:
        found = parity.compare(
            parity.onnx_runner(bench.onnx[kind]), cast(session), [feeds], precision=kind
        )
        parity.require(found, f"ONNX Runtime and the {kind} engine")
        typed = typed_feeds(session, feeds)
        session.prepare(typed)
        captured = session.captured
        samples = [session.time_once() for _ in range(SAMPLES)]
        parts = session.time_parts()
    layers = bench.backend.profile(engine, bench.target, typed, 10)
    total = sum(layer.ns for layer in layers)
    if not layers or total <= 0:
        raise AssertionError("the profile has no layers or no time in it")
    return {
        "build_seconds": engine.seconds,
        "engine_bytes": engine.path.stat().st_size,
        "max_rel": found.max_rel,
        "rms_rel": found.rms_rel,
        "cuda_graph": captured,
        "wall_p50_ms": statistics.median(s.wall_ns for s in samples) / 1e6,
        "device_p50_ms": statistics.median(s.device_ns for s in samples) / 1e6,
        "h2d_ms": parts.h2d_ns / 1e6,
        "compute_ms": parts.compute_ns / 1e6,
        "d2h_ms": parts.d2h_ns / 1e6,
        "layers": len(layers),
        "profile_ms": total / 1e6,
        "layers_with_shapes": sum(bool(layer.output_shapes) for layer in layers),
    }


def check_memory(bench: Bench, name: str) -> dict[str, Any]:
    """Run the same engine with one library for memory; outputs must be the same bit for bit."""
    target = bench.with_options(memory=name)
    engine = bench.build("fp32", target)
    with bench.open(engine) as session:
        expected = session.run(typed_feeds(session, bench.feeds()))
    with bench.open(engine, target) as session:
        found = session.run(typed_feeds(session, bench.feeds()))
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    return {"outputs": len(expected)}


def check_free_batch(bench: Bench) -> dict[str, Any]:
    """One engine for batches 1 to 8; a batch of 9 is refused."""
    path = export.to_onnx(
        Net(), (torch.randn(2, 3, SIZE, SIZE),), bench.folder / "free.onnx", dynamic_batch=True
    )
    engine = bench.backend.build(path, bench.target, bench.folder / "out" / "free")
    with bench.open(engine) as session:
        for batch in (1, 3, 8):
            feeds = {"input": np.ones((batch, 3, SIZE, SIZE), np.float32)}
            assert session.run(feeds)["output"].shape == (batch, 100)
        refused = raises(lambda: session.run({"input": np.ones((9, 3, SIZE, SIZE), np.float32)}))
    return {"refused": refused}


def check_same_answer_from_a_graph(bench: Bench) -> dict[str, Any]:
    """A timed run of the captured graph leaves the outputs of a plain run."""
    engine = bench.build("fp32")
    with bench.open(engine) as session:
        feeds = typed_feeds(session, bench.feeds())
        expected = session.run(feeds)
        session.prepare(feeds)
        session.time_once()
        session.time_parts()
        found = session.run(feeds)
    for key, value in expected.items():
        np.testing.assert_array_equal(found[key], value)
    return {"cuda_graph": session.captured}


def check_mismatch(bench: Bench) -> dict[str, Any]:
    """An engine of another version is refused, and building again makes it whole."""
    engine = bench.build("fp32")
    manifest = engine_store.read_manifest(engine.path)
    replace(manifest, version="0.0").write(engine.path)
    refused = raises(lambda: bench.open(engine))
    with bench.open(bench.build("fp32")) as session:
        session.run(typed_feeds(session, bench.feeds()))
    return {"refused": refused}


def raises(call: Callable[[], object]) -> str:
    """Return the message of the BackendError that ``call`` must raise."""
    try:
        call()
    except BackendError as error:
        return str(error)
    raise AssertionError("expected a BackendError, and there was none")


def cast(session: TensorRtSession) -> parity.Runner:
    """Run a session on inputs of any floating-point type."""
    return lambda feeds: session.run(typed_feeds(session, feeds))


def typed_feeds(session: TensorRtSession, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs in the engine's own types."""
    return {spec.name: feeds[spec.name].astype(spec.dtype) for spec in session.inputs}


def checks(bench: Bench) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name to check, in the order in which they run."""
    found: dict[str, Callable[[], dict[str, Any]]] = {}
    for kind in ("fp32", "fp16", "int8"):
        found[kind] = lambda kind=kind: check_precision(bench, kind)  # type: ignore[misc]
    for name in gpu_memory.installed():
        found[f"memory {name}"] = lambda name=name: check_memory(bench, name)  # type: ignore[misc]
    found["free batch"] = lambda: check_free_batch(bench)
    found["graph"] = lambda: check_same_answer_from_a_graph(bench)
    found["mismatch"] = lambda: check_mismatch(bench)
    return found


def run_one(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run one check; what it raises is its result."""
    started = time.perf_counter()
    try:
        facts = {"passed": True, **check()}
    except Exception as error:  # noqa: BLE001  the other checks still have to run
        facts = {"passed": False, "error": repr(error), "trace": traceback.format_exc()}
    return {**facts, "seconds": time.perf_counter() - started}


def fingerprint(target: Target, backend: Backend) -> dict[str, Any]:
    """What the figures belong to."""
    gpu = gpu_driver.facts(device_index(target))
    assert not isinstance(gpu, str)
    return {
        "gpu": gpu.name,
        "compute_capability": gpu.capability,
        "gpu_memory_bytes": gpu.memory_bytes,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **backend.versions(),
    }


def main() -> int:
    """Run all checks; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--target", default="trt", help="a profile of the tensorrt backend")
    parser.add_argument("--out", type=Path, default=Path("gpu_checks.json"))
    arguments = parser.parse_args()
    try:
        target = targets.load(arguments.target)
        here = replace(
            target, options=tuple((k, v) for k, v in target.options if k != "compute_capability")
        )
        backend = registry.for_target(here)
    except Prune2DeployError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    known = backend.availability(here)
    if not known.usable:
        print(f"nothing was checked: {known.reason}", file=sys.stderr)
        print(f"to run these checks: {known.fix}", file=sys.stderr)
        return 3
    with tempfile.TemporaryDirectory(prefix="p2d-gpu-") as folder:
        bench = Bench(Path(folder), here)
        results = {}
        for name, check in checks(bench).items():
            results[name] = run_one(check)
            print(f"{'ok  ' if results[name]['passed'] else 'FAIL'} {name}", file=sys.stderr)
    report = {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "host": fingerprint(here, backend),
        "target": arguments.target,
        "checks": results,
    }
    write_text(arguments.out, json.dumps(report, indent=2))
    print(arguments.out)
    return 0 if all(result["passed"] for result in results.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())
