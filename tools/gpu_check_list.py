"""The checks of ``gpu_checks``, one function each.

In: a :class:`Bench`, that is a folder and a target. Out: facts for the result, or an exception,
which is the result too. ``CHECKS`` tells which backends a check is for; what only TensorRT can be
asked lies in ``gpu_check_trt``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import gpu_check_bench
import numpy as np
from gpu_check_bench import SAMPLES, Bench, Facts, Skip, installed, raises
from gpu_check_trt import (
    check_free_batch,
    check_graph,
    check_memory,
    check_mismatch,
    check_timing_cache,
    check_transfers,
)

from prune2deploy import measure, watched
from prune2deploy.backends import gpu_buffers, gpu_driver, gpu_memory
from prune2deploy.backends.base import Array, Session
from prune2deploy.backends.devices import device_index
from prune2deploy.backends.tensorrt_session import TensorRtSession
from prune2deploy.backends.torch_backend import MODES
from prune2deploy.exporting import parity
from prune2deploy.target import Target

OWN_CLOCK = ("tensorrt", "torch")  # backends whose sessions tell the GPU's own time
RUN_CODES = (0, 4, 6)  # met, out of reach, too unstable to decide: all are answers


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
    device_ns = statistics.median(s.device_ns for s in samples)
    profiled, shaped = sum(o.ns for o in layers), sum(bool(o.output_shapes) for o in layers)
    if bench.target.backend in OWN_CLOCK:
        assert device_ns > 0, "the device's own time is not known"
        assert 0.1 < profiled / device_ns < 10, f"layers take {profiled} ns of {device_ns}"
        assert shaped >= 0.5 * len(layers), f"{shaped} of {len(layers)} have shapes"
    return {
        "build_seconds": engine.seconds,
        "engine_bytes": engine.path.stat().st_size,
        "judged_as": judged,
        "max_rel": found.max_rel,
        "rms_rel": found.rms_rel,
        "wall_p50_ms": statistics.median(s.wall_ns for s in samples) / 1e6,
        "device_p50_ms": device_ns / 1e6,
        "layers": len(layers),
        "profile_ms": profiled / 1e6,
        "layers_with_shapes": shaped,
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
    model = f"{gpu_check_bench.__file__}:net"
    line = [
        *(sys.executable, "-m", "prune2deploy", "run", "--model", model),
        *("--target", str(profile), "--speedup", "1.2", "--precision", kind, "--no-cache"),
        *("--data", "random", "--max-builds", "4", "--json", "--out", str(out)),
    ]
    done = subprocess.run(
        line, capture_output=True, text=True, env=watched.environment(), check=False
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


def check_copies(bench: Bench, name: str) -> Facts:
    """One library for memory without any engine: copies, times, a graph, too large a buffer."""
    installed(name)
    index = device_index(bench.target)
    gpu = gpu_driver.facts(index)
    assert not isinstance(gpu, str)
    memory = gpu_memory.choose(name, index)
    values, found = (memory.pinned((1 << 20,), np.dtype("float32")) for _ in range(2))
    values[...], found[...] = np.arange(1 << 20), 0
    address, first, last = memory.allocate(values.nbytes), memory.event(), memory.event()
    memory.record(first)
    memory.copy_in(address, values)
    memory.copy_out(found, address)
    memory.record(last)
    memory.synchronize()
    ns = memory.elapsed_ns(first, last)
    assert np.array_equal(values, found) and 0 < ns < 1e9, ns
    if name != "torch":  # whose copies note events of their own, which a capture forbids
        _check_captured_copy(memory, address, (values, found))
    refused = raises(lambda: memory.allocate(2 * gpu.memory_bytes))
    memory.close()
    return {"copies_ns": ns, "overfilled": refused}


def _check_captured_copy(
    memory: gpu_buffers.GpuMemory, address: int, arrays: tuple[Array, Array]
) -> None:
    values, found = arrays
    gpu_driver.CudaGraph.begin(memory.stream)
    memory.copy_in(address, values)
    graph = gpu_driver.CudaGraph.end(memory.stream)
    assert graph is not None, "a copy was not captured"
    values[...] = 7.0
    graph.launch(memory.stream)
    memory.copy_out(found, address)
    memory.synchronize()
    graph.close()
    assert (found == 7.0).all(), "the graph has not copied"


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
    **_each(gpu_memory.PROVIDERS, "copies ", check_copies, *OWN_CLOCK),
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
