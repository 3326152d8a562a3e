"""The checks of ``gpu_checks``, one function each, and the files that they share.

In: a :class:`Bench`, that is a folder and a target. Out: facts for the result, or an exception,
which is the result too. ``CHECKS`` tells which backends a check is for. Each is run in a process of
its own, so files are made once and found again by name.
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prune2deploy import measure
from prune2deploy.backends import engine_store, gpu_driver, gpu_memory, registry
from prune2deploy.backends.base import Backend, Engine, Session
from prune2deploy.backends.tensorrt import device_index
from prune2deploy.backends.tensorrt_session import TensorRtSession
from prune2deploy.backends.torch_backend import MODES
from prune2deploy.errors import BackendError
from prune2deploy.exporting import export, parity, precision, simplify
from prune2deploy.target import Target

SAMPLES = 50
SIZE = 128
ROWS = 8
RUN_CODES = (0, 4, 6)  # met, out of reach, too unstable to decide: all are answers
Facts = dict[str, Any]


class Skip(Exception):  # noqa: N818 - an outcome, not an error
    """The check cannot be made here; the text says why."""


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


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The net and an example, always the same."""
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(1, 3, SIZE, SIZE),)


class Bench:
    """The files, the target and the backend that the checks share."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder = folder
        self.target = target
        if target.backend == "tensorrt":
            self.target = self.with_options(cache=str(folder / "cache"))
        self.backend: Backend = registry.for_target(self.target)
        self.module, self.examples = net()

    def with_options(self, **changed: Any) -> Target:
        """The target with some options changed."""
        return replace(self.target, options=tuple({**dict(self.target.options), **changed}.items()))

    def onnx(self, kind: str) -> Path:
        """The net in one precision, made the first time that it is wanted."""
        path = self.folder / f"{kind}.onnx"
        if path.exists():
            return path
        if kind == "fp32":
            raw = export.to_onnx(self.module, self.examples, self.folder / "raw.onnx")
            return simplify.simplify(raw, path).path
        if kind == "fp16":
            return precision.to_fp16(self.onnx("fp32"), path).path
        if kind == "int8-fp16":
            return precision.to_fp16(self.onnx("int8"), path).path
        rows = [((torch.randn(1, 3, SIZE, SIZE),), None) for _ in range(ROWS)]
        options = precision.Int8Options(recipe=self.backend.int8_recipe(self.target))
        return precision.to_int8(self.onnx("fp32"), path, rows, options).path

    def build(self, kind: str, target: Target | None = None) -> Engine:
        """The engine of one precision."""
        onnx = self.onnx(kind)
        if self.backend.takes_program:
            torch.export.save(
                torch.export.export(self.module, self.examples), onnx.with_suffix(".pt2")
            )
        wanted = self.in_precision(kind, target)
        return self.backend.build(onnx, wanted, self.folder / "out" / kind)

    def in_precision(self, kind: str, target: Target | None = None) -> Target:
        """The target in the precision that a file is in."""
        return replace(target or self.target, precision=kind.partition("-")[0])

    def open(self, engine: Engine, target: Target | None = None) -> Session:
        """Open an engine for running."""
        return self.backend.open(engine, target or self.target)

    def feeds(self, session: Session) -> Facts:
        """The example as the engine's input, in the engine's own types."""
        given = parity.as_sample(self.examples)
        return {spec.name: given[spec.name].astype(spec.dtype) for spec in session.inputs}


def check_precision(bench: Bench, kind: str) -> Facts:
    """Build, compare with ONNX Runtime on the CPU, time and profile."""
    target = bench.in_precision(kind)
    engine = bench.build(kind)
    judged = bench.backend.arithmetic(target)
    with bench.open(engine, target) as session:
        found = parity.compare(
            parity.onnx_runner(bench.onnx(kind)),
            lambda feeds: session.run(bench.feeds(session)),
            [parity.as_sample(bench.examples)],
            precision=judged,
        )
        feeds = bench.feeds(session)
        session.prepare(feeds)
        samples = [session.time_once() for _ in range(SAMPLES)]
        facts = _parts(session)
    layers = bench.backend.profile(engine, target, feeds, 10)
    parity.require(found, f"ONNX Runtime and the {kind} engine")
    if bench.target.backend != "ort":  # whose providers may run all as one operator
        assert sum(layer.ns for layer in layers) > 0, "the profile has no time in it"
    return {
        "build_seconds": engine.seconds,
        "engine_bytes": engine.path.stat().st_size,
        "judged_as": judged,
        "max_rel": found.max_rel,
        "rms_rel": found.rms_rel,
        "wall_p50_ms": statistics.median(s.wall_ns for s in samples) / 1e6,
        "device_p50_ms": statistics.median(s.device_ns for s in samples) / 1e6,
        "layers": len(layers),
        "profile_ms": sum(layer.ns for layer in layers) / 1e6,
        "layers_with_shapes": sum(bool(layer.output_shapes) for layer in layers),
        **facts,
    }


def _parts(session: Session) -> Facts:
    if not isinstance(session, TensorRtSession):
        return {}
    parts = session.time_parts()
    return {
        "cuda_graph": session.captured,
        "h2d_ms": parts.h2d_ns / 1e6,
        "compute_ms": parts.compute_ns / 1e6,
        "d2h_ms": parts.d2h_ns / 1e6,
    }


def check_measure(bench: Bench) -> Facts:
    """The real protocol in its own process: an engine against itself is near 1."""
    seen = measure.compare(bench.build("fp32"), bench.build("fp32"), bench.target)
    facts = {"ratio": seen.ratio, "ratio_ci95": seen.ratio_ci95, "clock": seen.clock}
    assert 0.9 < seen.ratio < 1.1, facts
    return {**facts, "p50_ms": seen.candidate.p50_ms, "flags": seen.flags}


def check_run(bench: Bench, kind: str) -> Facts:
    """A whole run from the command line; whatever it ships agrees with the module."""
    profile, out = bench.folder / "profile.toml", bench.folder / f"run-{kind}"
    profile.write_text(_profile(bench.target))
    line = [
        *(sys.executable, "-m", "prune2deploy", "run", "--model", f"{__file__}:net"),
        *("--target", str(profile), "--speedup", "1.2", "--precision", kind, "--no-cache"),
        *("--data", "random", "--max-builds", "4", "--json", "--out", str(out)),
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, env=engine_store._environment(), check=False
    )
    assert done.returncode in RUN_CODES, f"exit code {done.returncode}: {done.stderr[-1500:]}"
    told = json.loads(done.stdout)
    assert all(border["passed"] for border in told["parity"]), told["parity"]
    keys = ("verdict", "speedup", "builds", "seconds", "precision", "notes", "parity")
    return {"exit_code": done.returncode, **{key: told[key] for key in keys}}


def _profile(target: Target) -> str:
    """A profile as TOML, without what only holds for builds on machines without a GPU."""
    top = ("backend", "device", "precision", "threads")
    lines = [f"{key} = {json.dumps(getattr(target, key))}" for key in top]
    lines += ["[options]", *(f"{key} = {json.dumps(value)}" for key, value in target.options)]
    return "\n".join([*lines, "[measure]", "max_seconds = 40.0", ""])


# --- TensorRT only ------------------------------------------------------------------------------


def _session(bench: Bench, engine: Engine, target: Target | None = None) -> TensorRtSession:
    session = bench.open(engine, target)
    assert isinstance(session, TensorRtSession)
    return session


def check_memory(bench: Bench, name: str) -> Facts:
    """Run with one library for memory as with another, and overfill the GPU."""
    if importlib.util.find_spec(gpu_memory.PROVIDERS[name][0].partition(".")[0]) is None:
        raise Skip(f"{gpu_memory.PROVIDERS[name][0]} is not installed")
    engine, target = bench.build("fp32"), bench.with_options(memory=name)
    with _session(bench, engine) as session:
        expected = session.run(bench.feeds(session))
    with _session(bench, engine, target) as session:
        run = parity.compare(lambda f: expected, session.run, [bench.feeds(session)])
        session.prepare(bench.feeds(session))
        device_ns = session.time_once().device_ns
    parity.require(run, f"the first library and {name}")
    gpu = gpu_driver.facts(device_index(bench.target))
    assert not isinstance(gpu, str)
    memory = gpu_memory.choose(name, device_index(bench.target))
    refused = raises(lambda: memory.allocate(2 * gpu.memory_bytes))
    memory.close()
    return {"max_rel": run.max_rel, "device_ns": device_ns, "overfilled": refused}


def check_free_batch(bench: Bench) -> Facts:
    """One engine for batches 1 to 8; a batch of 9 is refused."""
    example = (torch.randn(2, 3, SIZE, SIZE),)
    path = export.to_onnx(bench.module, example, bench.folder / "free.onnx", dynamic_batch=True)
    engine = bench.backend.build(path, bench.target, bench.folder / "out" / "free")
    images = np.random.default_rng(0).standard_normal((9, 3, SIZE, SIZE)).astype(np.float32)
    found = []
    with _session(bench, engine) as session:
        for batch in (1, 3, 8):
            one = parity.compare(
                parity.onnx_runner(path), session.run, [{"input": images[:batch]}], precision="tf32"
            )
            found.append(parity.require(one, f"ONNX Runtime and a batch of {batch}").max_rel)
        refused = raises(lambda: session.run({"input": images}))
    return {"max_rel": found, "refused": refused}


def check_graph(bench: Bench) -> Facts:
    """A timed run of the captured graph leaves the outputs of a plain run in its buffers."""
    with _session(bench, bench.build("fp32")) as session:
        feeds = bench.feeds(session)
        expected = session.run(feeds)
        session.prepare(feeds)
        captured = session.captured
        for bound in session._bound.values():
            if bound.host.shape == expected["output"].shape:
                bound.host[...] = 0
        session.time_parts()  # copies in, launches the graph, copies out
        found = {name: session._bound[name].host.copy() for name in expected}
        graphed = statistics.median(session.time_once().wall_ns for _ in range(SAMPLES))
    with _session(bench, bench.build("fp32"), bench.with_options(cuda_graph=False)) as session:
        session.prepare(bench.feeds(session))
        plain = statistics.median(session.time_once().wall_ns for _ in range(SAMPLES))
    same = parity.compare(lambda f: expected, lambda f: found, [feeds])
    parity.require(same, "a plain run and the graph")
    return {"captured": captured, "wall_ms": graphed / 1e6, "without_graph_ms": plain / 1e6}


def check_transfers(bench: Bench) -> Facts:
    """Copies count where the profile says so: the wall time grows, the device time does not."""
    found = {}
    for counted in (False, True):
        target = bench.with_options(transfers=counted)
        with _session(bench, bench.build("fp32"), target) as session:
            session.prepare(bench.feeds(session))
            taken = [session.time_once() for _ in range(SAMPLES)]
        found[f"wall_ms_{counted}"] = statistics.median(s.wall_ns for s in taken) / 1e6
        found[f"device_ms_{counted}"] = statistics.median(s.device_ns for s in taken) / 1e6
    assert found["wall_ms_True"] > found["wall_ms_False"], found
    return found


def check_mismatch(bench: Bench) -> Facts:
    """Engines of another version and damaged ones are refused; building again helps."""
    engine = bench.build("fp32")
    manifest = engine_store.read_manifest(engine.path)
    replace(manifest, version="0.0").write(engine.path)
    version = raises(lambda: bench.open(engine))
    engine = bench.build("fp32")
    engine.path.write_bytes(engine.path.read_bytes()[:-100])
    damaged = raises(lambda: bench.open(engine))
    engine.path.write_bytes(b"garbage" * 100)
    sound = replace(manifest, engine_sha256=engine_store.sha256(engine.path))
    sound.write(engine.path)  # only the runtime itself can tell
    garbage = raises(lambda: bench.open(engine))
    with _session(bench, bench.build("fp32")) as session:
        session.run(bench.feeds(session))
    return {"version": version, "damaged": damaged, "garbage": garbage}


def check_timing_cache(bench: Bench) -> Facts:
    """Kernel timings are kept and reused; a damaged file costs time only."""
    if dict(bench.target.options).get("module") != "tensorrt":
        raise Skip("for the module tensorrt only")
    cache = bench.folder / "timing"
    target = bench.with_options(cache=str(cache))
    seconds = []
    for damage in (False, False, True):
        for engine in cache.glob("*.engine*"):
            engine.unlink()
        for timings in cache.glob("timing-*.bin") if damage else ():
            timings.write_bytes(b"garbage")
        seconds.append(bench.build("fp32", target).seconds)
        assert list(cache.glob("timing-*.bin")), "no kernel timings were kept"
    return {"first_s": seconds[0], "again_s": seconds[1], "damaged_s": seconds[2]}


def check_mode(bench: Bench, mode: str) -> Facts:
    """One way of PyTorch's to run; outputs are those of ONNX Runtime."""
    target = bench.with_options(mode=mode)
    known = bench.backend.availability(target)
    if not known.usable:
        raise Skip(known.reason)
    engine = bench.build("fp32", target)
    with bench.open(engine, target) as session:
        feeds = bench.feeds(session)
        found = parity.compare(
            parity.onnx_runner(bench.onnx("fp32")), session.run, [feeds], precision="tf32"
        )
        session.prepare(feeds)
        session.time_once()
        taken = statistics.median(session.time_once().wall_ns for _ in range(SAMPLES))
    parity.require(found, f"ONNX Runtime and PyTorch, {mode}")
    return {"max_rel": found.max_rel, "wall_p50_ms": taken / 1e6}


def raises(call: Callable[[], object]) -> str:
    """Return the message of the BackendError that ``call`` must raise."""
    try:
        call()
    except BackendError as error:
        return str(error)
    raise AssertionError("expected a BackendError, and there was none")


@dataclass(frozen=True)
class Check:
    """A check, and the backends that it is for (all where none are named)."""

    work: Callable[[Bench], Facts]
    backends: tuple[str, ...] = ()

    def fits(self, target: Target) -> bool:
        """Whether it is for a target's backend."""
        return not self.backends or target.backend in self.backends


def _each(
    kinds: Iterable[str], prefix: str, work: Callable[[Bench, str], Facts], *backends: str
) -> dict[str, Check]:
    return {prefix + kind: Check(partial(_swapped, work, kind), backends) for kind in kinds}


def _swapped(work: Callable[[Bench, str], Facts], kind: str, bench: Bench) -> Facts:
    return work(bench, kind)


QUANTISED = ("tensorrt", "ort", "openvino")
CHECKS: Mapping[str, Check] = {
    **_each(("fp32", "fp16"), "", check_precision),
    **_each(("int8", "int8-fp16"), "", check_precision, *QUANTISED),
    **_each(gpu_memory.PROVIDERS, "memory ", check_memory, "tensorrt"),
    "free batch": Check(check_free_batch, ("tensorrt",)),
    "graph": Check(check_graph, ("tensorrt",)),
    "transfers": Check(check_transfers, ("tensorrt",)),
    "mismatch": Check(check_mismatch, ("tensorrt",)),
    "timing cache": Check(check_timing_cache, ("tensorrt",)),
    **_each(MODES, "mode ", check_mode, "torch"),
    "measure": Check(check_measure),
    **_each(("fp32", "fp16"), "run ", check_run),
    **_each(("int8",), "run ", check_run, *QUANTISED),
}
"""Name to check, in the order in which they run."""
