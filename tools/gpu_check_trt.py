"""The checks of ``gpu_checks`` that are for TensorRT alone, one function each.

In: a :class:`Bench`. Out: facts for the result, or an exception, which is the result too.
"""

from __future__ import annotations

import statistics
from dataclasses import replace

import numpy as np
import torch
from gpu_check_bench import SAMPLES, SIZE, Bench, Facts, Skip, installed, raises

from prune2deploy import atomic
from prune2deploy.backends import engine_store
from prune2deploy.backends.base import Engine
from prune2deploy.backends.tensorrt_session import TensorRtSession
from prune2deploy.exporting import export, parity
from prune2deploy.target import Target


def _session(bench: Bench, engine: Engine, target: Target | None = None) -> TensorRtSession:
    session = bench.open(engine, target)
    assert isinstance(session, TensorRtSession)
    return session


def check_memory(bench: Bench, name: str) -> Facts:
    """Run with one library for memory as with another."""
    installed(name)
    engine, target = bench.build("fp32"), bench.with_options(memory=name)
    with _session(bench, engine) as session:
        expected = session.run(bench.feeds(session))
    with _session(bench, engine, target) as session:
        run = parity.compare(lambda f: expected, session.run, [bench.feeds(session)])
        session.prepare(bench.feeds(session))
        device_ns = session.time_once().device_ns
    parity.require(run, f"the first library and {name}")
    return {"max_rel": run.max_rel, "device_ns": device_ns}


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
    """The graph is captured, and a launch computes the outputs of a plain run anew."""
    with _session(bench, bench.build("fp32")) as session:
        feeds = bench.feeds(session)
        expected = session.run(feeds)
        session.prepare(feeds)
        assert session.captured, "the engine was not captured"
        for name in expected:
            bound = session._bound[name]
            bound.host[...] = 0
            session._memory.copy_in(bound.address, bound.host)
        session.time_parts()  # copies in, launches the graph, copies out
        found = {name: session._bound[name].host.copy() for name in expected}
        graphed = statistics.median(session.time_once().wall_ns for _ in range(SAMPLES))
    with _session(bench, bench.build("fp32"), bench.with_options(cuda_graph=False)) as session:
        session.prepare(bench.feeds(session))
        plain = statistics.median(session.time_once().wall_ns for _ in range(SAMPLES))
    same = parity.compare(lambda f: expected, lambda f: found, [feeds])
    parity.require(same, "a plain run and the graph")
    return {"wall_ms": graphed / 1e6, "without_graph_ms": plain / 1e6}


def check_transfers(bench: Bench) -> Facts:
    """Copies count where the profile says so: wall time and device time grow."""
    found = {}
    for counted in (False, True):
        target = bench.with_options(transfers=counted)
        with _session(bench, bench.build("fp32"), target) as session:
            session.prepare(bench.feeds(session))
            taken = [session.time_once() for _ in range(SAMPLES)]
        found[f"wall_ms_{counted}"] = statistics.median(s.wall_ns for s in taken) / 1e6
        found[f"device_ms_{counted}"] = statistics.median(s.device_ns for s in taken) / 1e6
    for clock in ("wall", "device"):
        assert found[f"{clock}_ms_True"] > found[f"{clock}_ms_False"], found
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
    sound = replace(manifest, engine_sha256=atomic.sha256(engine.path))
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
