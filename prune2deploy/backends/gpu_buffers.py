"""GPU buffers, streams and events through pycuda, cuda-python or torch.

TensorRT only computes; memory, copies and timing come from elsewhere. The three libraries are
behind one interface and imported only when an engine is opened. All use the device's primary
context, so they can live in one process.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import numpy as np

from prune2deploy.backends.base import Array
from prune2deploy.errors import BackendError
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
        """Return the device address of a new buffer; it lives until ``free`` or ``close``."""

    @abstractmethod
    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Return a host array in page-locked memory, which copies can run from at full speed."""

    @abstractmethod
    def free(self, address: int, host: Array) -> None:
        """Give back a buffer and a pinned array, which nobody may use afterwards."""

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

    def free(self, address: int, host: Array) -> None:
        """See the base class."""
        self._buffers.remove(address)
        self._do("cudaFree", address)
        pinned = int(host.ctypes.data)
        if pinned in self._hosts:  # an empty array says nothing of where it lies
            self._hosts.remove(pinned)
            self._do("cudaFreeHost", pinned)

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
        try:
            self._queue = self._drv.Stream()
        except BaseException:
            self._context.pop()
            raise
        self.stream = int(self._queue.handle)
        self._buffers: dict[int, Any] = {}

    def allocate(self, nbytes: int) -> int:
        """See the base class."""
        with self._translated():
            try:
                buffer = self._drv.mem_alloc(max(nbytes, 1))
            except self._drv.MemoryError as error:
                raise BackendError(_full(nbytes)) from error
        self._buffers[int(buffer)] = buffer
        return int(buffer)

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        with self._translated():
            array: Array = self._drv.pagelocked_empty(shape, dtype)
        return array

    def free(self, address: int, host: Array) -> None:
        """See the base class; the array goes with the last reference to it."""
        with self._translated():
            self._buffers.pop(address).free()

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
        with self._translated():
            return self._drv.Event()

    def record(self, event: Any) -> None:
        """See the base class."""
        with self._translated():
            event.record(self._queue)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """See the base class."""
        with self._translated():
            return int(end.time_since(start) * NS_PER_MS)

    def synchronize(self) -> None:
        """See the base class."""
        with self._translated():
            self._queue.synchronize()

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return _translated(self._drv.Error)

    def close(self) -> None:
        """See the base class."""
        for buffer in self._buffers.values():
            with contextlib.suppress(self._drv.Error):  # what failed before, once more
                buffer.free()
        self._buffers = {}
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
        with self._translated():
            try:
                buffer = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=self._device)
            except torch.cuda.OutOfMemoryError as error:
                raise BackendError(_full(nbytes)) from error
        self._buffers[int(buffer.data_ptr())] = buffer
        return int(buffer.data_ptr())

    def pinned(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """See the base class."""
        nbytes = int(np.prod(shape)) * dtype.itemsize
        with self._translated():
            raw = self._torch.empty(nbytes, dtype=self._torch.uint8, pin_memory=True).numpy()
        array: Array = raw.view(dtype).reshape(shape)
        return array

    def free(self, address: int, host: Array) -> None:
        """See the base class; the array goes with the last reference to it."""
        del self._buffers[address]

    def copy_in(self, address: int, source: Array) -> None:
        """See the base class."""
        with self._translated(), self._torch.cuda.stream(self._queue):
            host = self._torch.from_numpy(source.reshape(-1).view(np.uint8))
            self._buffers[address][: source.nbytes].copy_(host, non_blocking=True)

    def copy_out(self, target: Array, address: int) -> None:
        """See the base class."""
        with self._translated(), self._torch.cuda.stream(self._queue):
            host = self._torch.from_numpy(target.reshape(-1).view(np.uint8))
            host.copy_(self._buffers[address][: target.nbytes], non_blocking=True)

    def event(self) -> Any:
        """See the base class."""
        with self._translated():
            return self._torch.cuda.Event(enable_timing=True)

    def record(self, event: Any) -> None:
        """See the base class."""
        with self._translated():
            event.record(self._queue)

    def elapsed_ns(self, start: Any, end: Any) -> int:
        """See the base class."""
        with self._translated():
            return int(start.elapsed_time(end) * NS_PER_MS)

    def synchronize(self) -> None:
        """See the base class."""
        with self._translated():
            self._queue.synchronize()

    def _translated(self) -> contextlib.AbstractContextManager[None]:
        return _translated(RuntimeError)

    def close(self) -> None:
        """See the base class."""
        self._buffers = {}


@contextlib.contextmanager
def _translated(kind: type[BaseException]) -> Iterator[None]:
    """What a library raises as BackendError."""
    try:
        yield
    except kind as error:
        raise BackendError(f"the GPU failed: {error}") from error


def _full(nbytes: int) -> str:
    return f"cannot allocate {nbytes} bytes on the GPU{_memory_hint('MemoryAllocation')}"


def _memory_hint(name: str) -> str:
    if "MemoryAllocation" in name:
        return "; the GPU's memory is full: end other programs on it, or use a smaller batch"
    return ""
