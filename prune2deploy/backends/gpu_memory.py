"""GPU buffers, streams and events through whichever library is there: pycuda, cuda-python, torch.

TensorRT only computes; memory, copies and timing come from elsewhere. The three libraries are
behind one interface, chosen by the profile or by what is installed, and imported only when an
engine is opened. All use the device's primary context, so they can live in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from prune2deploy.backends.base import Array, Availability
from prune2deploy.errors import BackendError, ConfigError, MissingBackend
from prune2deploy.units import NS_PER_MS


class GpuMemory(ABC):
    """Buffers, one stream, and events on one GPU.

    Attributes:
        name: Of the library.
        stream: Driver handle of the stream that everything is queued on.
    """

    name: str
    stream: int

    @abstractmethod
    def allocate(self, nbytes: int) -> int:
        """Return the device address of a new buffer; it lives until ``close``."""

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a host array in page-locked memory, which copies can run from at full speed."""

    @abstractmethod
    def copy_in(self, address: int, source: Array) -> None:
        """Queue a copy of a pinned array to the device."""

    @abstractmethod
    def copy_out(self, target: Array, address: int) -> None:
        """Queue a copy from the device to a pinned array."""

    @abstractmethod
    def event(self) -> Any:
        """Make an event that can take times."""

    @abstractmethod
    def record(self, event: Any) -> None:
        """Queue ``event`` on the stream."""

    @abstractmethod
    def elapsed_ns(self, start: Any, end: Any) -> int:
        """Nanoseconds on the device between two events that have happened."""

    @abstractmethod
    def synchronize(self) -> None:
        """Wait until the stream has done all that was queued.

        Raises:
            BackendError: Something that was queued failed.
        """

    @abstractmethod
    def close(self) -> None:
        """Free every buffer and the stream; nothing may be called afterwards."""


class CudaPythonMemory(GpuMemory):
    """NVIDIA's cuda-python."""

    name = "cuda"

    def __init__(self, index: int) -> None:
        self._rt = importlib.import_module("cuda.bindings.runtime")
        self._do("cudaSetDevice", index)
        self._handle = self._do("cudaStreamCreateWithFlags", self._rt.cudaStreamNonBlocking)
        self.stream = int(self._handle)
        self._buffers: list[int] = []
        self._hosts: list[int] = []
        self._events: list[Any] = []

    def _do(self, function: str, *arguments: Any) -> Any:
        code, *results = getattr(self._rt, function)(*arguments)
        if int(code):
            raise BackendError(f"{function} failed: {code.name}{_memory_hint(code.name)}")
        return results[0] if results else None

    def allocate(self, nbytes: int) -> int:
        """See the base class."""
        address = int(self._do("cudaMalloc", max(nbytes, 1)))
        self._buffers.append(address)
        return address

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        import ctypes

        nbytes = int(np.prod(shape)) * dtype.itemsize
        address = int(self._do("cudaMallocHost", max(nbytes, 1)))
        self._hosts.append(address)
        raw = (ctypes.c_uint8 * nbytes).from_address(address)
        array: Array = np.ctypeslib.as_array(raw).view(dtype).reshape(shape)
        return array

    def copy_in(self, address: int, source: Array) -> None:
        """See the base class."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyHostToDevice
        host = source.ctypes.data
        self._do("cudaMemcpyAsync", address, host, source.nbytes, kind, self._handle)

    def copy_out(self, target: Array, address: int) -> None:
        """See the base class."""
        kind = self._rt.cudaMemcpyKind.cudaMemcpyDeviceToHost
        host = target.ctypes.data
        self._do("cudaMemcpyAsync", host, address, target.nbytes, kind, self._handle)

    def event(self) -> Any:
        """See the base class."""
        self._events.append(self._do("cudaEventCreate"))
        return self._events[-1]

    def record(self, event: Any) -> None:
        """See the base class."""
        self._do("cudaEventRecord", event, self._handle)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """See the base class."""
        return int(self._do("cudaEventElapsedTime", start, end) * NS_PER_MS)

    def synchronize(self) -> None:
        """See the base class."""
        self._do("cudaStreamSynchronize", self._handle)

    def close(self) -> None:
        """See the base class."""
        rt = self._rt  # codes are not looked at: after a failure every call repeats that failure
        for address in self._buffers:
            rt.cudaFree(address)
        for address in self._hosts:
            rt.cudaFreeHost(address)
        for event in self._events:
            rt.cudaEventDestroy(event)
        rt.cudaStreamDestroy(self._handle)
        self._buffers, self._hosts, self._events = [], [], []


@functools.cache
def _primary(index: int) -> Any:
    """The primary context of a device in pycuda, one handle for the life of the process.

    A handle that is let go makes the context current once more and takes it from whoever else
    (torch) lives in it.
    """
    driver = importlib.import_module("pycuda.driver")
    driver.init()
    return driver.Device(index).retain_primary_context()


class PyCudaMemory(GpuMemory):
    """pycuda, on the device's primary context, which is current until ``close``."""

    name = "pycuda"

    def __init__(self, index: int) -> None:
        self._drv = importlib.import_module("pycuda.driver")
        self._context = _primary(index)
        self._context.push()
        self._queue = self._drv.Stream()
        self.stream = int(self._queue.handle)
        self._buffers: list[Any] = []

    def allocate(self, nbytes: int) -> int:
        """See the base class."""
        try:
            self._buffers.append(self._drv.mem_alloc(max(nbytes, 1)))
        except self._drv.MemoryError as error:
            hint = _memory_hint("MemoryAllocation")
            raise BackendError(f"cannot allocate {nbytes} bytes on the GPU{hint}") from error
        return int(self._buffers[-1])

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        array: Array = self._drv.pagelocked_empty(shape, dtype)
        return array

    def copy_in(self, address: int, source: Array) -> None:
        """See the base class."""
        with self._translated():
            self._drv.memcpy_htod_async(address, source, self._queue)

    def copy_out(self, target: Array, address: int) -> None:
        """See the base class."""
        with self._translated():
            self._drv.memcpy_dtoh_async(target, address, self._queue)

    def event(self) -> Any:
        """See the base class."""
        return self._drv.Event()

    def record(self, event: Any) -> None:
        """See the base class."""
        with self._translated():
            event.record(self._queue)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """See the base class."""
        return int(end.time_since(start) * NS_PER_MS)

    def synchronize(self) -> None:
        """See the base class."""
        with self._translated():
            self._queue.synchronize()

    @contextlib.contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except self._drv.Error as error:
            raise BackendError(f"the GPU failed: {error}") from error

    def close(self) -> None:
        """See the base class."""
        for buffer in self._buffers:
            with contextlib.suppress(self._drv.Error):  # what failed before, once more
                buffer.free()
        self._buffers = []
        self._context.pop()


class TorchMemory(GpuMemory):
    """torch's own allocator and streams."""

    name = "torch"

    def __init__(self, index: int) -> None:
        self._torch = importlib.import_module("torch")
        self._device = self._torch.device("cuda", index)
        self._torch.cuda.set_device(self._device)  # where TensorRT will put the engine
        self._queue = self._torch.cuda.Stream(self._device)
        self.stream = int(self._queue.cuda_stream)
        self._buffers: dict[int, Any] = {}

    def allocate(self, nbytes: int) -> int:
        """See the base class."""
        torch = self._torch
        try:
            buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
        except torch.cuda.OutOfMemoryError as error:
            hint = _memory_hint("MemoryAllocation")
            raise BackendError(f"cannot allocate {nbytes} bytes on the GPU{hint}") from error
        self._buffers[int(buffer.data_ptr())] = buffer
        return int(buffer.data_ptr())

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        raw = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()
        array: Array = raw.view(dtype).reshape(shape)
        return array

    def copy_in(self, address: int, source: Array) -> None:
        """See the base class."""
        with self._torch.cuda.stream(self._queue):
            host = self._torch.from_numpy(source.reshape(-1).view(np.uint8))
            self._buffers[address][: source.nbytes].copy_(host, non_blocking=True)

    def copy_out(self, target: Array, address: int) -> None:
        """See the base class."""
        with self._torch.cuda.stream(self._queue):
            host = self._torch.from_numpy(target.reshape(-1).view(np.uint8))
            host.copy_(self._buffers[address][: target.nbytes], non_blocking=True)

    def event(self) -> Any:
        """See the base class."""
        return self._torch.cuda.Event(enable_timing=True)

    def record(self, event: Any) -> None:
        """See the base class."""
        event.record(self._queue)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """See the base class."""
        return int(start.elapsed_time(end) * NS_PER_MS)

    def synchronize(self) -> None:
        """See the base class."""
        try:
            self._queue.synchronize()
        except RuntimeError as error:
            raise BackendError(f"the GPU failed: {error}") from error

    def close(self) -> None:
        """See the base class."""
        self._buffers = {}


PROVIDERS: dict[str, tuple[str, Callable[[int], GpuMemory]]] = {
    "pycuda": ("pycuda", PyCudaMemory),
    "cuda": ("cuda.bindings", CudaPythonMemory),
    "torch": ("torch", TorchMemory),
}
"""Name in a profile to the Python package and the class; ``auto`` tries them in this order."""


def installed() -> tuple[str, ...]:
    """Names of the libraries that are installed, without importing them."""
    return tuple(name for name, (package, _) in PROVIDERS.items() if _is_installed(package))


def availability(wanted: str) -> Availability:
    """Say whether the library that the profile wants (or any, for ``auto``) is installed."""
    names = tuple(PROVIDERS) if wanted == "auto" else (wanted,)
    if wanted != "auto" and wanted not in PROVIDERS:
        choices = ", ".join(("auto", *PROVIDERS))
        return Availability(False, f"options.memory is {wanted!r}, expected one of {choices}")
    if any(name in installed() for name in names):
        return Availability(True)
    packages = ", ".join(PROVIDERS[name][0] for name in names)
    return Availability(
        False,
        f"no library for GPU memory is installed (looked for {packages})",
        'pip install "prune2deploy[trt]", or pip install cuda-python',
    )


def choose(wanted: str, index: int) -> GpuMemory:
    """Open GPU number ``index`` with the wanted library, or the first that opens for ``auto``.

    Raises:
        ConfigError: There is no such choice.
        MissingBackend: None opens; says what each one answered.
    """
    if wanted != "auto" and wanted not in PROVIDERS:
        raise ConfigError(
            f"options.memory: found {wanted!r}, expected one of {', '.join(('auto', *PROVIDERS))}"
        )
    failures = []
    for name in installed() if wanted == "auto" else (wanted,):
        opened = _open(name, index)
        if not isinstance(opened, str):
            return opened
        failures.append(f"{name}: {opened}")
    raise MissingBackend(
        f"no library can open GPU {index} ({'; '.join(failures) or 'none is installed'}); "
        'pip install "prune2deploy[trt]", or pip install cuda-python'
    )


def _open(name: str, index: int) -> GpuMemory | str:
    """Open a GPU with one library, or return why it could not."""
    try:
        return PROVIDERS[name][1](index)
    except Exception as error:  # noqa: BLE001  importing a driver binding may raise anything
        return f"{type(error).__name__}: {error}"


def _is_installed(package: str) -> bool:
    """Look for a package; the parent of a dotted name may be missing too."""
    parent = package.partition(".")[0]
    if importlib.util.find_spec(parent) is None:
        return False
    return parent == package or importlib.util.find_spec(package) is not None


def _memory_hint(name: str) -> str:
    if "MemoryAllocation" in name:
        return "; the GPU's memory is full: end other programs on it, or use a smaller batch"
    return ""
