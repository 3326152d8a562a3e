"""What the NVIDIA driver itself can say and do, through ``libcuda`` alone.

Needs no Python package: whether a GPU is there is asked before anything large is imported. CUDA
graphs are captured here too, because streams of any library are plain driver handles.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

from prune2deploy.errors import BackendError

LIBRARY = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
_NO_DEVICE = 100  # CUDA_ERROR_NO_DEVICE


@dataclass(frozen=True)
class GpuFacts:
    """One GPU: its name, compute capability (``"89"``) and total memory in bytes."""

    name: str
    capability: str
    memory_bytes: int


def facts(index: int) -> GpuFacts | str:
    """Describe GPU number ``index``, or say in words why there is none to use."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return f"there is no NVIDIA driver on this machine ({LIBRARY} is not found)"
    code = cuda.cuInit(0)
    if code == _NO_DEVICE:
        return "the NVIDIA driver is installed but sees no GPU"
    if code:
        return f"the NVIDIA driver does not start: {_error_name(cuda, code)}"
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    if index >= count.value:
        return f"there is no GPU number {index} (the driver sees {count.value})"
    device = ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    name = ctypes.create_string_buffer(256)
    cuda.cuDeviceGetName(name, len(name), device)
    major, minor, memory = ctypes.c_int(), ctypes.c_int(), ctypes.c_size_t()
    cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return GpuFacts(name.value.decode(), f"{major.value}{minor.value}", memory.value)


def use(index: int) -> None:
    """Make GPU number ``index`` the one that CUDA libraries work on in this thread.

    Raises:
        BackendError: There is no such GPU, or the driver refuses.
    """
    found = facts(index)
    if isinstance(found, str):
        raise BackendError(f"GPU {index}: {found}")
    cuda = ctypes.CDLL(LIBRARY)
    device, context = ctypes.c_int(), ctypes.c_void_p()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    code = cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
    code = code or cuda.cuCtxSetCurrent(context)
    if code:
        raise BackendError(f"GPU {index} cannot be used: {_error_name(cuda, code)}")


def versions() -> dict[str, str]:
    """CUDA version that the driver supports; empty without a driver."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return {}
    found = ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(found)):
        return {}
    return {"cuda_driver": f"{found.value // 1000}.{found.value % 1000 // 10}"}


class CudaGraph:
    """Work captured from a stream, launched as a whole.

    Use ``begin``, queue the work on the stream, then ``end``; ``end`` gives ``None`` when the
    work cannot be captured, and the stream is usable again.
    """

    def __init__(self, executable: ctypes.c_void_p) -> None:
        self._executable = executable
        self._cuda = ctypes.CDLL(LIBRARY)

    @staticmethod
    def begin(stream: int) -> None:
        """Start capturing what is queued on ``stream`` (a driver handle)."""
        cuda = ctypes.CDLL(LIBRARY)
        code = cuda.cuStreamBeginCapture_v2(ctypes.c_void_p(stream), _THREAD_LOCAL)
        if code:
            raise BackendError(f"CUDA cannot capture this stream: {_error_name(cuda, code)}")

    @staticmethod
    def end(stream: int) -> CudaGraph | None:
        """Stop capturing; return the graph ready to launch, or ``None``."""
        cuda = ctypes.CDLL(LIBRARY)
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        code = cuda.cuStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph))
        if code or not graph:
            return None
        flags = ctypes.c_ulonglong(0)
        code = cuda.cuGraphInstantiateWithFlags(ctypes.byref(executable), graph, flags)
        cuda.cuGraphDestroy(graph)
        return None if code else CudaGraph(executable)

    def launch(self, stream: int) -> None:
        """Queue the captured work on ``stream``."""
        code = self._cuda.cuGraphLaunch(self._executable, ctypes.c_void_p(stream))
        if code:
            raise BackendError(f"a CUDA graph failed to run: {_error_name(self._cuda, code)}")

    def close(self) -> None:
        """Free the graph."""
        self._cuda.cuGraphExecDestroy(self._executable)


def _error_name(cuda: ctypes.CDLL, code: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorName(code, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({code})"
