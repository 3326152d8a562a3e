"""An opened TensorRT engine: buffers, runs, times and the profile per layer.

A run is copy in, compute, copy out, each between events of its own; compute is launched as a
CUDA graph where it can be captured. Only public calls that TensorRT 10 and 11 and TensorRT for
RTX share are used.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.backends.base import Array, Sample, Session, TensorSpec
from prune2deploy.backends.feeds import require
from prune2deploy.backends.gpu_buffers import GpuMemory
from prune2deploy.backends.gpu_driver import CudaGraph
from prune2deploy.errors import BackendError
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming, Shape
from prune2deploy.units import NS_PER_MS

WARM_RUNS = 3


@dataclass(frozen=True)
class Parts:
    """Device time of one run in nanoseconds: copies in, compute, copies out."""

    h2d_ns: int
    compute_ns: int
    d2h_ns: int


@dataclass(frozen=True)
class _Bound:
    """A tensor's device buffer and its page-locked host array."""

    address: int
    host: Array


class TensorRtSession(Session):
    """An opened engine; binds buffers for the shapes of the inputs that it is given."""

    def __init__(self, trt: Any, engine: Path, memory: GpuMemory, target: Target) -> None:
        self._trt, self._memory = trt, memory
        self._transfers = bool(target.option("transfers", False))
        self._use_graph = bool(target.option("cuda_graph", True))
        self._logger = trt.Logger(trt.Logger.ERROR)
        if hasattr(trt, "init_libnvinfer_plugins"):  # not in every tensorrt_rtx
            trt.init_libnvinfer_plugins(self._logger, "")  # ONNX operators may have become plugins
        self._runtime = trt.Runtime(self._logger)  # must outlive the engine
        self._engine = self._runtime.deserialize_cuda_engine(engine.read_bytes())
        if self._engine is None:
            raise BackendError(
                f"{engine}: TensorRT {trt.__version__} cannot read this engine; build it again"
            )
        self._context = _context(trt, self._engine)
        if self._context is None:
            raise BackendError(f"{engine}: no room on the GPU for the engine's working memory")
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE  # marks cost launch time
        self._bound: dict[str, _Bound] = {}
        self._graph: CudaGraph | None = None
        self._events = [memory.event() for _ in range(4)]
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self.inputs = tuple(self._spec(n) for n in names if self._is_input(n))
        self.outputs = tuple(self._spec(n) for n in names if not self._is_input(n))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once without a graph; outputs by name."""
        self._bind(feeds)
        self._copy_in()
        self._compute()
        self._copy_out()
        self._memory.synchronize()
        return {spec.name: self._bound[spec.name].host.copy() for spec in self.outputs}

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Bind inputs, warm up, and capture the computation where that works."""
        self.run(feeds)
        for _ in range(WARM_RUNS):  # TensorRT for RTX finishes its kernels in the first runs
            self._compute()
        self._memory.synchronize()
        self._drop_graph()
        if self._use_graph:
            self._graph = self._capture()

    def _capture(self) -> CudaGraph | None:
        """The computation as a graph; ``None`` where the engine does not let itself be captured.

        TensorRT then refuses, and what was captured is a graph that does nothing.
        """
        CudaGraph.begin(self._memory.stream)
        queued = self._context.execute_async_v3(self._memory.stream)
        graph = CudaGraph.end(self._memory.stream)
        if graph is not None and not queued:
            graph.close()
        return graph if queued else None

    @property
    def captured(self) -> bool:
        """Whether timed runs are launched as a CUDA graph."""
        return self._graph is not None

    def time_once(self) -> Sample:
        """Run on what ``prepare`` bound; ``device_ns`` is the time between events on the GPU."""
        first, last = self._events[0], self._events[-1]
        cpu = time.thread_time_ns()
        wall = time.perf_counter_ns()
        self._memory.record(first)
        if self._transfers:
            self._copy_in()
        self._launch()
        if self._transfers:
            self._copy_out()
        self._memory.record(last)
        self._memory.synchronize()
        wall = time.perf_counter_ns() - wall
        cpu = time.thread_time_ns() - cpu
        return Sample(wall, cpu, self._memory.elapsed_ns(first, last))

    def time_parts(self) -> Parts:
        """Run once with both transfers and time each part on the device."""
        memory, events = self._memory, self._events
        memory.record(events[0])
        self._copy_in()
        memory.record(events[1])
        self._launch()
        memory.record(events[2])
        self._copy_out()
        memory.record(events[3])
        memory.synchronize()
        spans = [memory.elapsed_ns(a, b) for a, b in itertools.pairwise(events)]
        return Parts(*spans)

    def profile(self, feeds: Mapping[str, Array], runs: int) -> tuple[OperatorTiming, ...]:
        """Time every layer over ``runs`` runs and keep each one's minimum."""
        least: dict[str, float] = {}

        class Listener(self._trt.IProfiler):  # type: ignore[misc, name-defined, unused-ignore]
            def report_layer_time(self, layer_name: str, ms: float) -> None:
                least[layer_name] = min(least.get(layer_name, float("inf")), ms * NS_PER_MS)

        self.run(feeds)
        self._drop_graph()
        listener = Listener()
        self._context.profiler = listener
        for _ in range(runs + WARM_RUNS):
            self._compute()
            self._memory.synchronize()
        inspector = self._engine.create_engine_inspector()
        inspector.execution_context = self._context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        return layer_timings(text, least)

    def close(self) -> None:
        """Free the graph, the buffers and the engine."""
        self._drop_graph()
        self._context = self._engine = self._runtime = None  # before what they need: buffers, GPU
        self._bound, self._events = {}, []
        self._memory.close()

    def _is_input(self, name: str) -> bool:
        return bool(self._engine.get_tensor_mode(name) == self._trt.TensorIOMode.INPUT)

    def _spec(self, name: str) -> TensorSpec:
        if self._engine.get_tensor_location(name) != self._trt.TensorLocation.DEVICE:
            raise BackendError(
                f"tensor {name!r} of the engine is a shape, which TensorRT wants on the host; "
                "export the model with that shape fixed"
            )
        kind = self._engine.get_tensor_dtype(name)
        try:
            dtype = np.dtype(self._trt.nptype(kind))
        except TypeError as error:  # bfloat16 and what is smaller than a byte
            raise BackendError(
                f"tensor {name!r} of the engine is {kind}, which numpy lacks; build it from a "
                "model whose inputs and outputs are fp32, fp16 or integers"
            ) from error
        return TensorSpec(name, tuple(self._engine.get_tensor_shape(name)), dtype.name)

    def _bind(self, feeds: Mapping[str, Array]) -> None:
        """Set input shapes, make buffers of the right sizes, and fill the inputs."""
        require(self.inputs, feeds)
        for spec in self.inputs:
            shape = feeds[spec.name].shape
            if not self._context.set_input_shape(spec.name, shape):
                raise BackendError(
                    f"input {spec.name!r} of shape {shape} does not fit the engine's {spec.shape} "
                    "(or the range of batches that it was built for)"
                )
        for spec in (*self.inputs, *self.outputs):
            self._ensure_buffer(spec)
        for spec in self.inputs:
            self._bound[spec.name].host[...] = feeds[spec.name]

    def _ensure_buffer(self, spec: TensorSpec) -> None:
        shape = tuple(self._context.get_tensor_shape(spec.name))
        if -1 in shape:
            raise BackendError(
                f"the shape of {spec.name!r} depends on data, which is not supported"
            )
        known = self._bound.get(spec.name)
        if known is None or known.host.shape != shape:
            self._drop_graph()
            self._free(spec.name)
            host = self._memory.pinned(shape, np.dtype(spec.dtype))
            known = _Bound(self._memory.allocate(host.nbytes), host)
            self._bound[spec.name] = known
        self._context.set_tensor_address(spec.name, known.address)

    def _free(self, name: str) -> None:
        """Give back a tensor's buffer and array; nothing that is queued uses them any more."""
        if name in self._bound:
            old = self._bound.pop(name)
            self._memory.free(old.address, old.host)

    def _copy_in(self) -> None:
        for spec in self.inputs:
            self._memory.copy_in(self._bound[spec.name].address, self._bound[spec.name].host)

    def _copy_out(self) -> None:
        for spec in self.outputs:
            self._memory.copy_out(self._bound[spec.name].host, self._bound[spec.name].address)

    def _compute(self) -> None:
        if not self._context.execute_async_v3(self._memory.stream):
            raise BackendError("TensorRT could not start the engine")

    def _launch(self) -> None:
        if self._graph is None:
            self._compute()
        else:
            self._graph.launch(self._memory.stream)

    def _drop_graph(self) -> None:
        if self._graph is not None:
            self._graph.close()
        self._graph = None


def _context(trt: Any, engine: Any) -> Any:
    """What the engine runs in; kernels are those that stay, from the first run on.

    TensorRT for RTX would else run others while it compiles those for a free batch's size.
    """
    if not hasattr(trt, "DynamicShapesKernelSpecializationStrategy"):
        return engine.create_execution_context()
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = (
        trt.DynamicShapesKernelSpecializationStrategy.EAGER
    )
    return engine.create_execution_context(config)


def layer_timings(inspected: str, least_ns: Mapping[str, float]) -> tuple[OperatorTiming, ...]:
    """Join the inspector's JSON with each layer's least time.

    A layer that the inspector does not describe keeps its time and has no shapes.

    Args:
        inspected: ``IEngineInspector.get_engine_information`` in JSON.
        least_ns: Layer name to nanoseconds, from the profiler.
    """
    layers = json.loads(inspected).get("Layers", [])
    facts = {layer.get("Name"): layer for layer in layers if isinstance(layer, dict)}
    return tuple(
        OperatorTiming(
            name=name,
            kind=str(facts.get(name, {}).get("LayerType", "unknown")),
            input_shapes=_shapes(facts.get(name, {}).get("Inputs", [])),
            output_shapes=_shapes(facts.get(name, {}).get("Outputs", [])),
            ns=ns,
        )
        for name, ns in least_ns.items()
    )


def _shapes(tensors: list[dict[str, Any]]) -> tuple[Shape, ...]:
    return tuple(tuple(tensor.get("Dimensions", ())) for tensor in tensors)
