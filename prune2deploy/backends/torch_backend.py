"""PyTorch itself as a runtime: eager, ``torch.compile``, and CUDA graphs.

PyTorch cannot run an ONNX file, so the engine is the exported program (``torch.export``) that was
saved beside it under the same name with the ending ``.pt2``. On a GPU times are taken with CUDA
events. Operators are timed one after another as the eager program runs them; for a compiled
program that shows where the work is, not how long the fused kernels take.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prune2deploy.backends import devices, onnx_file
from prune2deploy.backends.base import (
    Array,
    Availability,
    Backend,
    Engine,
    Sample,
    Session,
)
from prune2deploy.backends.feeds import require
from prune2deploy.errors import BackendError, BuildError, ConfigError
from prune2deploy.target import Option, Target
from prune2deploy.timing import OperatorTiming

MODES = ("eager", "compile", "cudagraph")
_KINDS = {"fp32": "float32", "fp16": "float16"}
"""Precision to the type of torch that its weights have."""


class TorchBackend(Backend):
    """PyTorch on the device that the profile names (``cpu``, ``cuda:0``)."""

    name = "torch"
    takes_program = True
    options: ClassVar[Mapping[str, Option]] = {
        "mode": "eager",
        "channels_last": False,
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {"mode": MODES}
    precisions: ClassVar[tuple[str, ...]] = tuple(_KINDS)

    def check(self, target: Target) -> None:
        """See the base class; the device is the CPU or an NVIDIA GPU."""
        super().check(target)
        on_gpu = _on_gpu(target)
        if target.option("mode", "eager") == "cudagraph" and not on_gpu:
            raise ConfigError(
                f"{target.path}:options.mode: found 'cudagraph' for device {target.device!r}, "
                f"expected device {devices.GPU!r}, which alone has CUDA graphs"
            )

    def availability(self, target: Target) -> Availability:
        """Look whether the device is there, and what the mode needs."""
        mode = str(target.option("mode", "eager"))
        on_gpu = _on_gpu(target)
        checks = (
            (mode != "compile" or _compiles(on_gpu), *_NO_COMPILER[on_gpu]),
            (not on_gpu or devices.nvidia_gpu_visible(), devices.NO_GPU, devices.NO_GPU_FIX),
        )
        for fits, reason, fix in checks:
            if not fits:
                return Availability(False, reason, fix)
        return _sees_gpu() if on_gpu else Availability(True)

    def arithmetic(self, target: Target) -> str:
        """TF32 in place of fp32 on a GPU, where PyTorch lets convolutions use it."""
        on_gpu = _on_gpu(target)
        return "tf32" if target.precision == "fp32" and on_gpu else target.precision

    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Copy the exported program that lies beside ``onnx``, and open it once."""
        started = time.perf_counter()
        onnx_file.check(onnx)
        program = onnx.with_suffix(".pt2")
        if not program.is_file():
            raise BuildError(
                f"{onnx}: PyTorch cannot run ONNX, and the exported program {program.name} is not "
                "beside it; save torch.export.export(model, inputs) there with torch.export.save"
            )
        path = onnx_file.place_file(program, out)
        _load(path, target)
        return Engine(path, onnx, self.name, time.perf_counter() - started)

    def open(self, engine: Engine, target: Target) -> Session:
        """Load the program onto the device; compile it where the mode says so (on first run)."""
        return TorchSession(engine, target)

    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Run the program node by node; the minimum of each over ``runs`` runs."""
        import torch

        from prune2deploy.backends.torch_nodes import node_times

        with TorchSession(engine, target) as session, torch.inference_mode():
            session.prepare(feeds)
            return node_times(session.module, session.bound, runs, target.device)

    def versions(self) -> dict[str, str]:
        """Versions of torch and of the CUDA that it was built with."""
        import torch

        return {"torch": str(torch.__version__), "cuda": str(torch.version.cuda)}


_NO_COMPILER = {
    False: ("torch.compile needs a C++ compiler on CPUs", "apt-get install g++"),
    True: ("torch.compile needs triton and a C compiler on GPUs", "apt-get install gcc"),
}


def _compiles(on_gpu: bool) -> bool:
    """Whether what ``torch.compile`` calls is installed (Inductor's C++, or Triton's launchers)."""
    if not on_gpu:
        return any(map(shutil.which, ("c++", "g++", "clang++")))
    compilers = (os.environ.get("CC", "gcc"), "gcc", "clang")
    return importlib.util.find_spec("triton") is not None and any(map(shutil.which, compilers))


def _sees_gpu() -> Availability:
    import torch

    if torch.cuda.is_available():
        return Availability(True)
    return Availability(
        False,
        f"torch {torch.__version__} (for CUDA {torch.version.cuda}) cannot use the GPU",
        "install the build of torch for your driver's CUDA version",
    )


def _load(path: Path, target: Target) -> Any:
    """Load an exported program and return its module on the device, which becomes the current one.

    Streams, events and graphs of torch belong to the current device.
    """
    import torch

    try:
        program = torch.export.load(str(path))
    except Exception as error:  # zip, pickle and export errors share no base
        raise BuildError(f"{path}: not a program saved by torch.export: {error}") from error
    from torch.export.passes import move_to_device_pass

    found = {value.dtype for value in program.state_dict.values() if value.is_floating_point()}
    wanted: torch.dtype = getattr(torch, _KINDS[target.precision])
    if found and wanted not in found:
        told = ", ".join(sorted(map(str, found)))
        raise BuildError(
            f"{path}: the program's weights are {told}, expected {wanted} for "
            f"{target.precision}; export the module in that precision"
        )
    device = _device(target)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return move_to_device_pass(program, str(device)).module()


def _device(target: Target) -> Any:
    """The profile's device as torch names it; a GPU always has its number."""
    import torch

    if _on_gpu(target):
        return torch.device("cuda", devices.device_index(target))
    return torch.device("cpu")


def _on_gpu(target: Target) -> bool:
    return devices.require(target, (devices.CPU, devices.GPU), "backend 'torch'") == devices.GPU


@contextlib.contextmanager
def _settings(threads: int) -> Iterator[None]:
    """Settings of the process that sway latency: threads (0 leaves them), subnormals as zero."""
    import torch

    before, flushed = torch.get_num_threads(), _SUBNORMAL * 1.0 == 0.0
    if threads:
        torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        torch.set_flush_denormal(flushed)


_SUBNORMAL = 1e-310
"""Times one it is zero where subnormal numbers are flushed; torch cannot be asked."""


class TorchSession(Session):
    """An exported program on its device.

    Threads and subnormal numbers are set for the whole process until it is closed. Sessions that
    are open at a time are closed in reverse order.

    Attributes:
        module: The graph module, before compiling.
        bound: Inputs on the device, in order.
    """

    def __init__(self, engine: Engine, target: Target) -> None:
        import torch

        self._torch = torch
        self._device = _device(target)
        mode = str(target.option("mode", "eager"))
        self._last = bool(target.option("channels_last", False))
        self._half = target.precision == "fp16"
        self.module = _load(engine.path, target)
        if self._last:
            self.module.to(memory_format=torch.channels_last)
        self._call = torch.compile(self.module) if mode == "compile" else self.module
        self._graphed = mode == "cudagraph"
        self._graph: Any = None
        self.bound: tuple[Any, ...] = ()
        self.inputs, self.outputs = onnx_file.signature(engine.onnx)
        self._settings = contextlib.ExitStack()
        self._settings.enter_context(_settings(target.threads))

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; outputs by the names of the ONNX file, in order."""
        from torch.utils import _pytree as pytree

        with self._running():
            leaves = pytree.tree_leaves(self._call(*self._upload(feeds)))
        results = [leaf for leaf in leaves if isinstance(leaf, self._torch.Tensor)]
        return {
            spec.name: (value.float() if value.is_floating_point() else value).numpy(force=True)
            for spec, value in zip(self.outputs, results, strict=True)
        }

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Put the inputs on the device and capture the CUDA graph where the mode says so."""
        with self._running():
            self.bound = self._upload(feeds)
            if self._graphed:
                self._graph = self._capture()

    def _capture(self) -> Any:
        cuda = self._torch.cuda
        side = cuda.Stream()
        side.wait_stream(cuda.current_stream())
        with cuda.stream(side):
            for _ in range(3):
                self._call(*self.bound)
        cuda.synchronize()
        graph = cuda.CUDAGraph()
        with cuda.graph(graph):
            self._call(*self.bound)
        return graph

    def time_once(self) -> Sample:
        """Run on the bound inputs; on a GPU between two events, until the device is done."""
        with self._running():
            return self._on_gpu() if self._device.type == "cuda" else self._on_cpu()

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Without gradients; what PyTorch raises (out of memory, no capture) as BackendError."""
        try:
            with self._torch.inference_mode():
                yield
        except RuntimeError as error:
            raise BackendError(f"PyTorch failed to run: {error}") from error

    def _on_cpu(self) -> Sample:
        call, bound = self._call, self.bound
        cpu = time.thread_time_ns()
        wall = time.perf_counter_ns()
        call(*bound)
        wall = time.perf_counter_ns() - wall
        return Sample(wall, time.thread_time_ns() - cpu)

    def _on_gpu(self) -> Sample:
        cuda = self._torch.cuda
        first, last = cuda.Event(enable_timing=True), cuda.Event(enable_timing=True)
        cuda.synchronize()
        cpu = time.thread_time_ns()
        wall = time.perf_counter_ns()
        first.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            self._call(*self.bound)
        last.record()
        last.synchronize()
        wall = time.perf_counter_ns() - wall
        cpu = time.thread_time_ns() - cpu
        return Sample(wall, cpu, round(first.elapsed_time(last) * 1e6))

    def _upload(self, feeds: Mapping[str, Array]) -> tuple[Any, ...]:
        require(self.inputs, feeds)
        torch = self._torch
        values = []
        for spec in self.inputs:
            value = torch.from_numpy(np.ascontiguousarray(feeds[spec.name])).to(self._device)
            if self._half and value.is_floating_point():
                value = value.half()
            if self._last and value.dim() == 4:
                value = value.contiguous(memory_format=torch.channels_last)
            values.append(value)
        return tuple(values)

    def close(self) -> None:
        """Drop the program and what lies on the device; give the process its settings back."""
        self._settings.close()
        self._graph = None
        self._call = None
        self.module = None
        self.bound = ()
