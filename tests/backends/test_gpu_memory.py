"""GPU memory without a GPU: stand-ins keep the driver's rules on contexts and errors."""

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from prune2deploy.backends import gpu_memory
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
    module.Stream = lambda: SimpleNamespace(handle=3, synchronize=act)
    module.Event = lambda: SimpleNamespace(record=act)
    module.mem_alloc = lambda nbytes: Buffer(64)
    module.memcpy_htod_async = module.memcpy_dtoh_async = act
    monkeypatch.setitem(sys.modules, "pycuda", ModuleType("pycuda"))
    monkeypatch.setitem(sys.modules, "pycuda.driver", module)
    gpu_memory._primary.cache_clear()
    yield state
    gpu_memory._primary.cache_clear()


def test_sessions_leave_the_stack_of_contexts_as_it_was_and_share_one_handle(driver):
    for index in (0, 0, 1, 0):
        memory = gpu_memory.PyCudaMemory(index)
        assert len(driver.stack) == 1
        memory.allocate(8)
        memory.close()
        assert not driver.stack
    assert driver.retained == [0, 1]


def test_a_failed_gpu_is_told_by_pycudas_words_and_closing_says_nothing(driver):
    memory = gpu_memory.PyCudaMemory(0)
    memory.allocate(8)
    event, host = memory.event(), np.zeros(2)
    driver.failed = True
    for call in (
        lambda: memory.copy_in(64, host),
        lambda: memory.copy_out(host, 64),
        lambda: memory.record(event),
        memory.synchronize,
    ):
        with pytest.raises(BackendError, match="the GPU failed: an illegal memory access"):
            call()
    memory.close()
    assert not driver.stack


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
    memory = gpu_memory.CudaPythonMemory(0)
    memory.allocate(8)
    memory.allocate(8)
    memory.event()
    failed.append(True)
    with pytest.raises(BackendError, match="cudaStreamSynchronize failed: cudaErrorIllegalAddress"):
        memory.synchronize()
    memory.close()
    assert freed == ["cudaFree", "cudaFree", "cudaEventDestroy", "cudaStreamDestroy"]
