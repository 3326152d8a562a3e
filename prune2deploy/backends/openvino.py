"""OpenVINO, used directly: Intel CPUs and GPUs, and ARM CPUs.

The engine is a checked copy of the ONNX file; OpenVINO compiles it when it is opened. The
precision of the computation is asked for, because on CPUs with bfloat16 units the default would
quietly compute in bfloat16. Operator times come from its performance counters.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prune2deploy.backends import onnx_file
from prune2deploy.backends.base import (
    Array,
    Availability,
    Backend,
    Engine,
    Sample,
    Session,
    TensorSpec,
)
from prune2deploy.backends.feeds import require
from prune2deploy.backends.onnx_file import Node, Shapes
from prune2deploy.errors import BackendError, BuildError, MissingBackend
from prune2deploy.target import Option, Target
from prune2deploy.timing import OperatorTiming, Shape

FIX = "pip install openvino"
_PRECISION = {"fp32": "f32", "fp16": "f16", "int8": "f32"}  # int8 is in the graph (Q/DQ)


class OpenVinoBackend(Backend):
    """OpenVINO on the device that the profile names (``cpu``, ``gpu``, ``npu``)."""

    name = "openvino"
    options: ClassVar[Mapping[str, Option]] = {
        "streams": 1,
        "pin": False,  # bind its threads to cores
    }
    least: ClassVar[Mapping[str, float]] = {"streams": 1}

    def availability(self, target: Target) -> Availability:
        """Look whether OpenVINO is installed and sees the device."""
        try:
            openvino = _library()
        except (ImportError, OSError) as error:
            return Availability(False, f"openvino does not import: {error}", FIX)
        devices = openvino.Core().available_devices
        wanted = target.device.upper()
        if not any(d == wanted or d.startswith(f"{wanted}.") for d in devices):
            reason = f"OpenVINO sees no device {wanted} (it sees {', '.join(devices)})"
            return Availability(
                False, reason, "install the device's driver, or set device = 'cpu' in the profile"
            )
        return Availability(True)

    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Check and copy the model, and compile it once."""
        started = time.perf_counter()
        onnx_file.check(onnx)
        path = onnx_file.place(onnx, out)
        self._compile(path, target, counters=False)
        return Engine(path, onnx, self.name, time.perf_counter() - started)

    def open(self, engine: Engine, target: Target) -> Session:
        """Compile the model for the device."""
        return OpenVinoSession(self._compile(engine.path, target, counters=False))

    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Read the performance counters of ``runs`` runs."""
        compiled = self._compile(engine.path, target, counters=True)
        request = compiled.create_infer_request()
        inputs = tuple(_spec(port) for port in compiled.inputs)
        require(inputs, feeds)
        values = {spec.name: feeds[spec.name] for spec in inputs}
        least: dict[tuple[str, str], float] = {}
        for _ in range(runs + 3):
            with _running():
                request.infer(values)
            for info in request.get_profiling_info():
                ns = info.real_time.total_seconds() * 1e9
                if info.status == info.Status.EXECUTED and ns > 0:
                    key = (info.node_name, info.node_type)
                    least[key] = min(least.get(key, ns), ns)
        shapes = onnx_file.logical_shapes(engine.onnx)
        original = _original_layers(compiled)
        return tuple(
            OperatorTiming(name, kind, *_shapes(original.get(name, [name]), shapes), ns)
            for (name, kind), ns in least.items()
        )

    def versions(self) -> dict[str, str]:
        """Version and build of OpenVINO."""
        return {"openvino": str(_library().__version__)}

    def _compile(self, path: Path, target: Target, *, counters: bool) -> Any:
        try:
            openvino = _library()
        except ImportError as error:
            raise MissingBackend(f"openvino does not import ({error}); {FIX}") from error
        device = target.device.upper()
        settings: dict[str, Any] = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": _PRECISION[target.precision],
            "PERF_COUNT": counters,
            "NUM_STREAMS": str(target.option("streams", 1)),
        }
        if device == "CPU":
            settings["ENABLE_CPU_PINNING"] = bool(target.option("pin", False))
            settings["CPU_DENORMALS_OPTIMIZATION"] = True
            if target.threads:
                settings["INFERENCE_NUM_THREADS"] = target.threads
        try:
            return openvino.Core().compile_model(str(path), device, settings)
        except RuntimeError as error:
            raise BuildError(f"{path}: OpenVINO cannot compile it: {error}") from error


def _library() -> Any:
    """Import OpenVINO without its usage reporting.

    Importing it forks a process that calls home. Forked beside other threads that process can hang
    and outlive us, and measuring is no time for traffic. Without the package that does it OpenVINO
    uses a stub of its own.
    """
    reporter = "openvino_telemetry"
    unused = "openvino" not in sys.modules and reporter not in sys.modules
    if unused:
        sys.modules[reporter] = None  # type: ignore[assignment]  # None there means: not installed
    try:
        import openvino
    finally:
        if unused:
            del sys.modules[reporter]
    return openvino


def _original_layers(compiled: Any) -> dict[str, list[str]]:
    """Map each executed node to the names of the model's layers that were fused into it."""
    found: dict[str, list[str]] = {}
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if "originalLayersNames" in info:
            names = str(info["originalLayersNames"].astype(str))
            found[node.get_friendly_name()] = [n for n in names.split(",") if n]
    return found


def _shapes(layers: list[str], shapes: Shapes) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    """Logical shapes of the contraction among fused layers, or else of the first known one."""
    nodes = {node.name: node for node in shapes.nodes}
    known = [nodes[name] for name in (_in(nodes, layer) for layer in layers) if name]
    heavy = [n for n in known if n.kind in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    for node in heavy or known:
        inputs = tuple(shapes.shapes[i] for i in node.inputs if i in shapes.shapes)
        outputs = tuple(shapes.shapes[o] for o in node.outputs if o in shapes.shapes)
        return inputs, outputs
    return (), ()


def _in(nodes: Mapping[str, Node], layer: str) -> str:
    """Name of the ONNX node that a layer stems from; imports append parts (``/WithoutBiases``)."""
    while layer and layer not in nodes:
        layer = layer.rpartition("/")[0]
    return layer


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """What OpenVINO raises (a wrong shape, out of memory) as BackendError."""
    try:
        yield
    except RuntimeError as error:
        raise BackendError(f"OpenVINO failed to run: {error}") from error


class OpenVinoSession(Session):
    """A compiled model with one inference request."""

    def __init__(self, compiled: Any) -> None:
        self._compiled = compiled
        self._request = compiled.create_infer_request()
        self.inputs = tuple(_spec(port) for port in compiled.inputs)
        self.outputs = tuple(_spec(port) for port in compiled.outputs)

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; outputs by name."""
        require(self.inputs, feeds)
        with _running():
            results = self._request.infer({s.name: feeds[s.name] for s in self.inputs})
        return {s.name: np.array(results[i]) for i, s in enumerate(self.outputs)}

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Copy the inputs into the request's own tensors; transfers are not timed."""
        require(self.inputs, feeds)
        with _running():
            for spec in self.inputs:
                tensor = self._request.get_tensor(spec.name)
                tensor.shape = feeds[spec.name].shape
                tensor.data[...] = feeds[spec.name]

    def time_once(self) -> Sample:
        """Run on what was prepared; with one thread the work happens in the calling one."""
        request = self._request
        with _running():
            cpu = time.thread_time_ns()
            wall = time.perf_counter_ns()
            request.infer()
            wall = time.perf_counter_ns() - wall
            cpu = time.thread_time_ns() - cpu
        return Sample(wall, cpu)

    def close(self) -> None:
        """Drop request and model."""
        self._request = None
        self._compiled = None


def _spec(port: Any) -> TensorSpec:
    shape = port.get_partial_shape()
    dims = tuple(d.get_length() if d.is_static else -1 for d in shape)
    return TensorSpec(port.get_any_name(), dims, np.dtype(port.get_element_type().to_dtype()).name)
