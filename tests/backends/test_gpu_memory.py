"""GPU memory without a GPU: stand-ins keep the driver's rules on contexts and errors."""

import ctypes
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from prune2deploy.backends import gpu_buffers
from prune2deploy.errors import BackendError


class Refused(Exception):
    """What the stand-in of pycuda raises."""


@pytest.fixture
def driver(monkeypatch):
    """pycuda's driver: a stack of current contexts, and a device that may have failed for good."""
    state = SimpleNamespace(stack=[], retained=[], failed=False)

    def act(*arguments):
        if state.failed:
            raise Refused("an illegal memory access")
        return 1.5

    def answering(make):
        def call(*arguments):
            act()
            return make(*arguments)

        return call

    class Context:
        def push(self):
            state.stack.append(self)

        def pop(self):
            state.stack.pop()

    class Device:
        def __init__(self, index):
            self.index = index

        def retain_primary_context(self):
            state.retained.append(self.index)
            return Context()

    class Buffer(int):
        free = act

    module = ModuleType("pycuda.driver")
    module.init = lambda: None
    module.Device, module.Error, module.MemoryError = Device, Refused, MemoryError
    event = SimpleNamespace(record=act, time_since=act)
    module.Stream = answering(lambda: SimpleNamespace(handle=3, synchronize=act))
    module.Event = answering(lambda: event)
    module.mem_alloc = answering(lambda nbytes: Buffer(64))
    module.pagelocked_empty = answering(np.empty)
    module.memcpy_htod_async = module.memcpy_dtoh_async = act
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    gpu_buffers._primary.cache_clear()
    yield state
    gpu_buffers._primary.cache_clear()


def test_sessions_leave_the_stack_of_contexts_as_it_was_and_share_one_handle(driver):
    for index in (0, 0, 1, 0):
        memory = gpu_buffers.PyCudaMemory(index)
        assert len(driver.stack) == 1
        memory.free(memory.allocate(8), np.zeros(2))
        memory.allocate(8)
        memory.close()
        assert not driver.stack
    assert driver.retained == [0, 1]


def test_a_failed_gpu_is_told_by_pycudas_words_and_closing_says_nothing(driver):
    memory = gpu_buffers.PyCudaMemory(0)
    memory.allocate(8)
    event, host = memory.event(), np.zeros(2)
    driver.failed = True
    for call in (
        lambda: memory.copy_in(64, host),
        lambda: memory.copy_out(host, 64),
        lambda: memory.record(event),
        lambda: memory.elapsed_ns(event, event),
        lambda: memory.pinned((2,), np.dtype("float32")),
        lambda: memory.allocate(8),
        lambda: memory.free(64, host),
        memory.event,
        memory.synchronize,
    ):
        with pytest.raises(BackendError, match="the GPU failed: an illegal memory access"):
            call()
    memory.close()
    assert not driver.stack


def test_a_stream_that_cannot_be_made_leaves_the_stack_of_contexts_as_it_was(driver):
    driver.failed = True
    with pytest.raises(Refused):
        gpu_buffers.PyCudaMemory(0)
    assert not driver.stack


def test_a_failed_gpu_is_told_by_torchs_words(monkeypatch):
    """Torch is the real one, without a GPU: what needs one raises by itself or is made to."""
    torch = pytest.importorskip("torch")

    def fails(*arguments, **options):
        raise RuntimeError("CUDA error: an illegal memory access")

    failing = SimpleNamespace(record=fails, elapsed_time=fails, synchronize=fails)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(cuda_stream=3))
    memory = gpu_buffers.TorchMemory(0)
    memory._queue, host = failing, np.zeros(2)
    monkeypatch.setattr(torch.cuda, "Event", fails)
    monkeypatch.setattr(torch.cuda, "stream", fails)
    monkeypatch.setattr(torch, "empty", fails)
    for call in (
        lambda: memory.allocate(8),
        lambda: memory.pinned((2,), np.dtype("float32")),
        lambda: memory.copy_in(64, host),
        lambda: memory.copy_out(host, 64),
        memory.event,
        lambda: memory.record(failing),
        lambda: memory.elapsed_ns(failing, failing),
        memory.synchronize,
    ):
        with pytest.raises(BackendError, match="the GPU failed: CUDA error: an illegal memory"):
            call()


def test_cuda_python_gives_back_what_is_freed_once(monkeypatch):
    page, freed = (ctypes.c_uint8 * 64)(), []
    addresses = {"cudaMalloc": 5, "cudaMallocHost": ctypes.addressof(page)}

    def answer(name):
        def call(*arguments):
            if "Free" in name:
                freed.append((name, *arguments))
            return 0, addresses.get(name, 3)

        return call

    runtime = ModuleType("cuda.bindings.runtime")
    runtime.cudaStreamNonBlocking = 1
    runtime.__getattr__ = answer
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    memory = gpu_buffers.CudaPythonMemory(0)
    memory.free(memory.allocate(8), memory.pinned((2,), np.dtype("float32")))
    assert freed == [("cudaFree", 5), ("cudaFreeHost", ctypes.addressof(page))]
    memory.close()
    assert len(freed) == 2


def test_cuda_python_frees_all_it_can_after_a_failure(monkeypatch):
    freed, failed = [], []

    def answer(name):
        def call(*arguments):
            if "Free" in name or "Destroy" in name:
                freed.append(name)
            number = 700 if failed else 0
            code = type("Code", (int,), {"name": "cudaErrorIllegalAddress"})(number)
            return (code, 5) if name in ("cudaMalloc", "cudaEventCreate", STREAM) else (code,)

        return call

    STREAM = "cudaStreamCreateWithFlags"
    runtime = ModuleType("cuda.bindings.runtime")
    runtime.cudaStreamNonBlocking = 1
    runtime.__getattr__ = answer
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", runtime)
    memory = gpu_buffers.CudaPythonMemory(0)
    memory.allocate(8)
    memory.allocate(8)
    memory.event()
    failed.append(True)
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress"):
        memory.synchronize()
    memory.close()
    assert freed == ["cudaFree", "cudaFree", "cudaEventDestroy", "cudaStreamDestroy"]
