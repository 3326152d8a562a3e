"""The TensorRT session's own work: buffers, order of calls, graphs, times, profile.

There is no GPU here. The engine is a stand-in that computes in host memory, no sooner than somebody
waits for it, and has only methods that the real classes of ``tensorrt_rtx`` have too, where that is
installed.
"""

import ctypes
import importlib.util
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from prune2deploy.backends import gpu_buffers, gpu_memory, tensorrt_session
from prune2deploy.backends.gpu_buffers import GpuMemory
from prune2deploy.backends.tensorrt_session import TensorRtSession
from prune2deploy.errors import BackendError


class HostMemory(GpuMemory):
    """Buffers in host memory; what is queued waits for ``synchronize``, and moves the clock."""

    name = "host"
    stream = 7

    def __init__(self):
        self.live, self.clock, self.closed, self.capturing = {}, 0, False, False
        self.queue = []

    def allocate(self, nbytes):
        buffer = (ctypes.c_uint8 * max(nbytes, 1))()
        self.live[ctypes.addressof(buffer)] = buffer
        return ctypes.addressof(buffer)

    def free(self, address, host):
        assert not self.queue, "what is queued still uses it"
        del self.live[address]

    def pinned(self, shape, dtype):
        return np.zeros(shape, dtype)

    def later(self, ns, work):
        def done():
            self.clock += ns
            work()

        self.queue.append(done)

    def copy_in(self, address, source):
        self.later(10, lambda: ctypes.memmove(address, source.ctypes.data, source.nbytes))

    def copy_out(self, target, address):
        self.later(20, lambda: ctypes.memmove(target.ctypes.data, address, target.nbytes))

    def event(self):
        return SimpleNamespace(at=None)

    def record(self, event):
        self.later(0, lambda: setattr(event, "at", self.clock))

    def elapsed_ns(self, start, end):
        return end.at - start.at

    def synchronize(self):
        while self.queue:
            self.queue.pop(0)()

    def close(self):
        self.live, self.closed = {}, True


class Context:
    """Doubles its input (batch, 3); batches from 1 to 4."""

    def __init__(self, memory):
        self.memory, self.shape, self.addresses, self.profiler = memory, (-1, 3), {}, None
        self.starts, self.captures, self.nvtx_verbosity = True, True, "detailed"

    def set_input_shape(self, name, shape):
        if not 1 <= shape[0] <= 4:
            return False
        self.shape = tuple(shape)
        return True

    def get_tensor_shape(self, name):
        return self.shape

    def set_tensor_address(self, name, address):
        self.addresses[name] = address

    def execute_async_v3(self, stream):
        assert stream == self.memory.stream
        if self.memory.capturing:
            return self.captures
        assert set(self.addresses.values()) <= set(self.memory.live), "buffers must be alive"
        count = int(np.prod(self.shape))
        read, write = (
            np.ctypeslib.as_array((ctypes.c_float * count).from_address(self.addresses[name]))
            for name in ("x", "y")
        )
        self.memory.later(100, lambda: np.multiply(read, 2, out=write))
        if self.profiler is not None:
            self.profiler.report_layer_time("double", 0.5 - 0.01 * self.memory.clock / 1e6)
        return self.starts


class Inspector:
    execution_context = None

    def get_engine_information(self, form):
        assert form == "json"
        assert self.execution_context is not None, "free shapes are known to the context only"
        tensors = [{"Name": "x", "Dimensions": [2, 3]}]
        layers = [{"Name": "double", "LayerType": "Scale", "Inputs": tensors, "Outputs": tensors}]
        return json.dumps({"Layers": [*layers, "a name alone", {"LayerType": "nameless"}]})


class Engine:
    num_io_tensors = 2

    def __init__(self, memory, kind="float", location="device"):
        self.memory, self.kind, self.location = memory, kind, location
        self.config = SimpleNamespace(dynamic_shapes_kernel_specialization_strategy="lazy")

    def create_runtime_config(self):
        return self.config

    def create_execution_context(self, config):
        assert config.dynamic_shapes_kernel_specialization_strategy == "eager"
        return Context(self.memory)

    def get_tensor_location(self, name):
        return self.location

    def create_engine_inspector(self):
        return Inspector()

    def get_tensor_name(self, index):
        return "xy"[index]

    def get_tensor_mode(self, name):
        return "in" if name == "x" else "out"

    def get_tensor_dtype(self, name):
        return self.kind

    def get_tensor_shape(self, name):
        return (-1, 3)


def nptype(kind):
    if kind != "float":
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return np.float32


def library(engine):
    """A stand-in for the module."""
    return SimpleNamespace(
        __version__="0",
        Logger=type("Logger", (), {"ERROR": 0, "__init__": lambda self, level: None}),
        Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=lambda data: engine),
        nptype=nptype,
        TensorIOMode=SimpleNamespace(INPUT="in"),
        IProfiler=object,
        LayerInformationFormat=SimpleNamespace(JSON="json"),
        DynamicShapesKernelSpecializationStrategy=SimpleNamespace(EAGER="eager"),
        ProfilingVerbosity=SimpleNamespace(NONE="none"),
        TensorLocation=SimpleNamespace(DEVICE="device"),
    )


@pytest.fixture
def memory():
    return HostMemory()


@pytest.fixture
def opened(memory, make_target, tmp_path, monkeypatch):
    """Open the stand-in with options of the profile; capturing gives what ``graphs`` says."""
    graphs = SimpleNamespace(works=True, launched=0, closed=0, begun=[])

    class Graph:
        @staticmethod
        def begin(stream):
            graphs.begun.append(stream)
            memory.capturing = True

        @staticmethod
        def end(stream):
            memory.capturing = False
            return Graph() if graphs.works else None

        def launch(self, stream):
            graphs.launched += 1
            memory.later(100, lambda: None)

        def close(self):
            graphs.closed += 1

    monkeypatch.setattr(tensorrt_session, "CudaGraph", Graph)
    (tmp_path / "m.engine").write_bytes(b"engine")

    def make(engine=None, **options):
        target = make_target("tensorrt", device="cuda:0", options=options)
        trt = library(engine or Engine(memory))
        return TensorRtSession(trt, tmp_path / "m.engine", memory, target), graphs

    return make


def feeds(batch=2):
    return {"x": np.arange(3.0 * batch, dtype=np.float32).reshape(batch, 3) + 1}


def test_outputs_are_those_of_the_inputs_for_every_batch_in_the_range(opened):
    session, _ = opened()
    for batch in (2, 4, 1):
        np.testing.assert_array_equal(session.run(feeds(batch))["y"], 2 * feeds(batch)["x"])
        sizes = [len(buffer) for buffer in session._memory.live.values()]
        assert sizes == [12 * batch] * 2, "those of the shape before are given back"
    with pytest.raises(BackendError, match=r"'x' of shape \(5, 3\) does not fit.*\(-1, 3\)"):
        session.run(feeds(5))
    with pytest.raises(BackendError, match="input 'x' was not given"):
        session.run({})


def test_a_result_is_not_overwritten_by_the_next_run(opened):
    session, _ = opened()
    first = session.run(feeds())["y"]
    session.run({"x": -feeds()["x"]})
    np.testing.assert_array_equal(first, 2 * feeds()["x"])


def test_parts_are_timed_apart_and_transfers_count_only_where_asked(opened):
    session, _ = opened()
    session.prepare(feeds())
    parts = session.time_parts()
    assert (parts.h2d_ns, parts.compute_ns, parts.d2h_ns) == (10, 100, 20)
    memory = session._memory
    for counted, advance in ((False, 100), (True, 130)):
        session, _ = opened(transfers=counted)
        session.prepare(feeds())
        before = memory.clock
        assert session.time_once().device_ns == advance
        assert memory.clock - before == advance


def test_a_graph_is_launched_where_it_can_be_captured_and_dropped_with_its_buffers(opened):
    session, graphs = opened()
    session.prepare(feeds())
    assert session.captured and graphs.begun == [7]
    session.time_once()
    assert graphs.launched == 1
    session.run(feeds(4))  # other buffers: the graph would use those of before
    assert not session.captured and graphs.closed == 1
    graphs.works = False
    session.prepare(feeds())
    assert not session.captured
    session.time_once()
    assert graphs.launched == 1
    plain, graphs = opened(cuda_graph=False)
    plain.prepare(feeds())
    assert graphs.begun == [7, 7] and not plain.captured


def test_a_graph_that_the_engine_did_not_fill_is_not_launched(opened):
    session, graphs = opened()
    session._context.captures = False
    session.prepare(feeds())
    assert not session.captured and graphs.closed == 1
    assert session.time_once().device_ns == 100 and graphs.launched == 0


def test_layers_keep_their_least_time_and_the_inspectors_shapes(opened):
    session, _ = opened()
    (layer,) = session.profile(feeds(), 5)
    assert (layer.name, layer.kind, layer.output_shapes) == ("double", "Scale", ((2, 3),))
    assert 0 < layer.ns < 500_000


def test_a_library_without_that_choice_gets_a_plain_context_and_no_marks(
    memory, make_target, tmp_path
):
    engine = Engine(memory)
    engine.create_execution_context = lambda: Context(memory)
    trt = library(engine)
    del trt.DynamicShapesKernelSpecializationStrategy  # TensorRT proper
    (tmp_path / "m.engine").write_bytes(b"engine")
    target = make_target("tensorrt", device="cuda:0")
    session = TensorRtSession(trt, tmp_path / "m.engine", memory, target)
    np.testing.assert_array_equal(session.run(feeds())["y"], 2 * feeds()["x"])
    assert session._context.nvtx_verbosity == "none"


def test_plugins_are_known_before_an_engine_is_read_where_the_library_has_any(
    memory, make_target, tmp_path
):
    engine, order = Engine(memory), []
    trt = library(engine)
    trt.init_libnvinfer_plugins = lambda logger, namespace: order.append(namespace)
    trt.Runtime = lambda logger: SimpleNamespace(
        deserialize_cuda_engine=lambda data: order.append("read") or engine
    )
    (tmp_path / "m.engine").write_bytes(b"engine")
    TensorRtSession(trt, tmp_path / "m.engine", memory, make_target("tensorrt", device="cuda:0"))
    assert order == ["", "read"]


def test_what_the_engine_refuses_is_an_error(opened, memory, make_target, tmp_path):
    session, _ = opened()
    session._context.starts = False
    with pytest.raises(BackendError, match="could not start"):
        session.run(feeds())
    with pytest.raises(BackendError, match="tensor 'x' of the engine is bf16, which numpy lacks"):
        opened(Engine(memory, "bf16"))
    with pytest.raises(BackendError, match=r"tensor 'x' of the engine is a shape, .* on the host"):
        opened(Engine(memory, location="host"))
    engine = Engine(memory)
    engine.create_execution_context = lambda config: None
    with pytest.raises(BackendError, match="no room on the GPU"):
        opened(engine)
    nothing = library(None)
    with pytest.raises(BackendError, match=r"m.engine: TensorRT 0 cannot read"):
        TensorRtSession(nothing, tmp_path / "m.engine", memory, make_target("tensorrt"))


def test_closing_frees_everything(opened, memory):
    session, graphs = opened()
    with session:
        session.prepare(feeds())
    assert memory.closed and not memory.live and graphs.closed == 1
    assert session._context is None and session._engine is None


def test_the_stand_in_has_no_method_that_the_library_lacks():
    trt = pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    real = {
        Context: trt.IExecutionContext,
        Engine: trt.ICudaEngine,
        Inspector: trt.EngineInspector,
        SimpleNamespace: trt.Runtime,
    }
    names = {one: {n for n in vars(one) if not n.startswith("_")} for one in real}
    names[SimpleNamespace] = {"deserialize_cuda_engine"}
    for one, library_class in real.items():
        assert names[one] <= set(dir(library_class)), library_class
    assert {"profiler"} <= set(dir(trt.IExecutionContext))
    assert set(vars(library(None))) <= set(dir(trt))


def test_every_call_of_cuda_python_exists():
    if importlib.util.find_spec("cuda") is None:
        pytest.skip("cuda-python is not installed")
    runtime = pytest.importorskip("cuda.bindings.runtime", exc_type=ImportError)
    source = Path(gpu_buffers.__file__).read_text()
    used = set(re.findall(r'_do\("(cuda\w+)"', source)) | set(re.findall(r"rt\.(cuda\w+)", source))
    assert len(used) >= 10 and "cudaFreeHost" in used
    assert used <= set(dir(runtime))


def test_an_engine_that_does_not_open_gives_its_memory_back(make_target, tmp_path, monkeypatch):
    from prune2deploy.backends import engine_store, registry, tensorrt
    from prune2deploy.backends.base import Availability
    from prune2deploy.backends.base import Engine as Built

    memory = HostMemory()
    (tmp_path / "m.engine").write_bytes(b"engine")
    target = make_target("tensorrt", device="cuda:0")
    monkeypatch.setattr(engine_store, "read_manifest", lambda path: None)
    monkeypatch.setattr(engine_store, "check_fits", lambda *a, **k: None)
    monkeypatch.setattr(tensorrt, "import_module", lambda name: library(None))
    monkeypatch.setattr(gpu_memory, "choose", lambda *a: memory)
    backend = registry.for_target(target)
    monkeypatch.setattr(type(backend), "availability", lambda self, target: Availability(True))
    with pytest.raises(BackendError, match="cannot read this engine"):
        backend.open(Built(tmp_path / "m.engine", tmp_path / "m.onnx", "tensorrt", 0.0), target)
    assert memory.closed
