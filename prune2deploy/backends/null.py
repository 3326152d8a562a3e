"""A runtime without a device: latency is a known formula of the widths. For tests.

The time of one node is ``fixed_ns`` plus, for convolutions and matrix products,

    ns_per_mac * batch * positions * kernel * up(in) * up(out)      up(n) = step * ceil(n / step)

with ``in`` the channels that one output contracts (left as they are in grouped convolutions). The
whole is the sum over nodes. Sessions run on a simulated clock: nothing sleeps, and the noise, when
asked for, is multiplicative, log-normal and drawn from ``seed``.
"""

from __future__ import annotations

import math
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from prune2deploy.backends import onnx_file
from prune2deploy.backends.base import (
    Array,
    Availability,
    Backend,
    Engine,
    Sample,
    Session,
)
from prune2deploy.backends.onnx_file import Node
from prune2deploy.target import Option, Target
from prune2deploy.timing import OperatorTiming, Shape


def node_ns(node: Node, shapes: Mapping[str, Shape], target: Target) -> float:
    """Time of one node by the formula of this module, in nanoseconds.

    Args:
        node: A node of the graph.
        shapes: Shape of every tensor that it reads or makes.
        target: Whose options give ``step``, ``ns_per_mac`` and ``fixed_ns``.
    """
    options = {k: target.option(k, v) for k, v in NullBackend.options.items()}
    step = int(options["step"])
    cost = _padded_macs(node, shapes, step)
    return float(options["fixed_ns"]) + float(options["ns_per_mac"]) * cost


def _padded_macs(node: Node, shapes: Mapping[str, Shape], step: int) -> int:
    if node.kind not in ("Conv", "Gemm", "MatMul"):
        return 0
    weight, output = shapes[node.inputs[1]], shapes[node.outputs[0]]
    if node.kind == "Conv":
        grouped = node.attributes.get("group", 1) > 1
        contracted = weight[1] if grouped else _up(weight[1], step)
        positions = math.prod(output[2:]) * output[0]
        return positions * math.prod(weight[2:]) * contracted * _up(output[1], step)
    contracted = weight[1] if node.attributes.get("transB", 0) else weight[-2]
    return math.prod(output[:-1]) * _up(contracted, step) * _up(output[-1], step)


def _up(channels: int, step: int) -> int:
    return step * math.ceil(channels / step)


class NullBackend(Backend):
    """Computes latency instead of measuring it."""

    name = "null"
    simulated: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "step": 8,
        "ns_per_mac": 0.01,
        "fixed_ns": 1000.0,
        "noise": 0.0,  # standard deviation of the logarithm of one sample
        "seed": 0,
    }

    def availability(self, target: Target) -> Availability:
        """Usable everywhere."""
        return Availability(True)

    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Check and copy the model."""
        started = time.perf_counter()
        onnx_file.check(onnx)
        path = onnx_file.place(onnx, out)
        return Engine(path, onnx, self.name, time.perf_counter() - started)

    def open(self, engine: Engine, target: Target) -> Session:
        """Return a session that computes its times and can run on real values too."""
        return NullSession(engine, target, sum(o.ns for o in _operators(engine, target)))

    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Return the formula of every node, without noise."""
        return _operators(engine, target)

    def versions(self) -> dict[str, str]:
        """There is nothing to have a version."""
        return {"null": "1"}


def _operators(engine: Engine, target: Target) -> tuple[OperatorTiming, ...]:
    graph = onnx_file.logical_shapes(engine.path)
    return tuple(
        OperatorTiming(
            node.name,
            node.kind,
            tuple(graph.shapes[i] for i in node.inputs if i in graph.shapes),
            tuple(graph.shapes[o] for o in node.outputs if o in graph.shapes),
            node_ns(node, graph.shapes, target),
        )
        for node in graph.nodes
    )


class NullSession(Session):
    """Times by formula; values by ONNX's reference implementation."""

    def __init__(self, engine: Engine, target: Target, ns: float) -> None:
        self.inputs, self.outputs = onnx_file.signature(engine.path)
        self._ns = ns
        self._noise = float(target.option("noise", 0.0))
        content = zlib.crc32(engine.path.read_bytes())  # two engines do not share their noise
        self._random = np.random.default_rng((int(target.option("seed", 0)), content))
        self._path = engine.path

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once with ONNX's reference implementation; slow, for small models."""
        from onnx.reference import ReferenceEvaluator

        results = ReferenceEvaluator(str(self._path)).run(None, dict(feeds))
        return {s.name: np.asarray(r) for s, r in zip(self.outputs, results, strict=True)}

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Nothing to bind."""

    def time_once(self) -> Sample:
        """Compute the next sample; no time passes."""
        ns = round(self._ns * math.exp(self._noise * self._random.standard_normal()))
        return Sample(wall_ns=ns, cpu_ns=ns)

    def close(self) -> None:
        """Nothing to free."""
