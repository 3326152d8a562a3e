import gc
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from prune2deploy.backends import ort as ort_module
from prune2deploy.backends import ort_profile, ort_tensorrt, registry
from prune2deploy.backends.base import Engine
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.errors import BackendError, BuildError, ConfigError, MissingBackend

pytestmark = pytest.mark.ort
pytest.importorskip("onnxruntime")


@pytest.fixture
def ort():
    return registry.get("ort")


def test_an_engine_computes_what_the_reference_does(ort, make_target, make_onnx, tmp_path):
    onnx_reference = pytest.importorskip("onnx.reference")
    target, path = make_target(), make_onnx(20)
    engine = ort.build(path, target, tmp_path / "out")
    assert engine.path == tmp_path / "out" / "net.onnx"
    assert engine.path.read_bytes() == path.read_bytes()
    with ort.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=1)
        found = session.run(feeds)["y"]
    wanted = onnx_reference.ReferenceEvaluator(str(path)).run(None, feeds)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_operators_without_a_kernel_for_their_type_are_told_with_what_to_do(
    ort, make_target, tmp_path
):
    weight = numpy_helper.from_array(np.ones((4, 3, 3, 3)), "w")
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.DOUBLE, [1, n, 8, 8])
        for name, n in (("x", 3), ("y", 4))
    )
    conv = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1, 1, 1, 1])
    model = helper.make_model(
        helper.make_graph([conv], "g", [x], [y], [weight]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(BuildError, match=r"NOT_IMPLEMENTED.*float64, .* float32 \(model\.float"):
        ort.build(tmp_path / "net.onnx", make_target(), tmp_path / "out")


def test_what_is_bound_lives_as_long_as_the_session(
    ort, make_target, make_onnx, tmp_path, monkeypatch
):
    """A binding of older versions does not keep the arrays that it reads from."""
    onnxruntime = pytest.importorskip("onnxruntime")

    def bind(self, name, value):
        self._iobinding.bind_ortvalue_input(name, value._ortvalue)

    monkeypatch.setattr(onnxruntime.IOBinding, "bind_ortvalue_input", bind)
    target = make_target()
    engine = ort.build(make_onnx(), target, tmp_path / "out")
    session = ort.open(engine, target)
    feeds = random_feeds(session.inputs, seed=0)
    alive = [weakref.ref(array) for array in feeds.values()]
    session.prepare(feeds)
    del feeds
    gc.collect()
    assert all(one() is not None for one in alive)
    session.close()
    gc.collect()
    assert all(one() is None for one in alive)


def test_timing_reports_wall_and_thread_time(ort, make_target, make_onnx, tmp_path):
    target = make_target()
    engine = ort.build(make_onnx(), target, tmp_path / "out")
    with ort.open(engine, target) as session:
        session.prepare(random_feeds(session.inputs, seed=0))
        samples = [session.time_once() for _ in range(20)]
    assert all(s.wall_ns > 0 and s.cpu_ns > 0 and s.device_ns == 0 for s in samples)


def test_inputs_that_do_not_fit_are_errors_of_the_backend(ort, make_target, make_onnx, tmp_path):
    target = make_target()
    engine = ort.build(make_onnx(), target, tmp_path / "out")
    with ort.open(engine, target) as session:
        for use in (session.run, session.prepare):
            with pytest.raises(BackendError, match="input 'x' was not given; found none, expected"):
                use({})
        wrong = {"x": np.ones((1, 3, 5, 12), np.float32)}
        with pytest.raises(BackendError, match=r"ONNX Runtime failed to run: .*\n?.*12"):
            session.run(wrong)
        session.prepare(wrong)
        with pytest.raises(BackendError, match="ONNX Runtime failed to run"):
            session.time_once()
        with pytest.raises(BackendError, match="ONNX Runtime failed to run"):
            session.prepare({**wrong, "none": wrong["x"]})
    with pytest.raises(BackendError, match="ONNX Runtime failed to run"):
        ort.profile(engine, target, wrong, 1)


def test_the_profile_names_operators_with_logical_shapes(ort, make_target, make_onnx, tmp_path):
    target = make_target()
    engine = ort.build(make_onnx(20), target, tmp_path / "out")
    with ort.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=0)
    timings = ort.profile(engine, target, feeds, runs=5)
    convolutions = [t for t in timings if "Conv" in t.kind]
    assert [t.output_shapes for t in convolutions] == [((1, 20, 12, 12),), ((1, 8, 10, 10),)]
    assert convolutions[0].input_shapes[:3] == ((1, 3, 12, 12), (20, 3, 3, 3), (20,))
    assert convolutions[1].input_shapes[:2] == ((1, 20, 12, 12), (8, 20, 3, 3))
    assert all(t.ns >= 0 for t in timings)
    assert len({t.name for t in timings}) == len(timings)
    again = ort.profile(engine, target, feeds, runs=2)
    assert [t.name for t in again] == [t.name for t in timings]


def test_profiles_keep_the_minimum_and_tell_equal_names_apart():
    def event(name, index, dur):
        args = {"node_index": index, "op_name": "Reorder", "provider": "CPUExecutionProvider"}
        shapes = {"input_type_shape": [{"float": [1]}], "output_type_shape": [{"float": [1]}]}
        return {"name": f"{name}_kernel_time", "dur": dur, "args": {**args, **shapes}}

    events = [event("r", "1", 5), event("r", "7", 9), event("r", "1", 3), event("r", "7", 11)]
    shapes = pytest.importorskip("prune2deploy.backends.onnx_file").Shapes((), {}, {})
    found = ort_profile.timings(events, shapes)
    assert [(t.name, t.ns) for t in found] == [("r", 3000.0), ("r#1", 9000.0)]


def test_only_the_cpu_tells_operators_apart(ort, make_target, make_onnx, tmp_path):
    """One operator for all would count as time that no width changes, and so would launches."""
    from prune2deploy.backends.base import Engine

    for name in ("OpenVINO", "Tensorrt", "CUDA"):
        provider = f"{name}ExecutionProvider"
        target = make_target(options={"provider": provider})
        engine = Engine(make_onnx(), make_onnx(), "ort", 0.0)
        assert ort.profile(engine, target, {}, 1) == ()


def test_saving_the_optimised_graph_keeps_its_values(ort, make_target, make_onnx, tmp_path):
    plain, saved = make_target(), make_target(options={"save_optimized": True})
    path = make_onnx()
    engine = ort.build(path, saved, tmp_path / "out")
    assert engine.path.name == "net.optimized.onnx"
    with ort.open(engine, saved) as session:
        feeds = random_feeds(session.inputs, seed=0)
        found = session.run(feeds)["y"]
    with ort.open(Engine(path, path, "ort", 0.0), plain) as session:
        np.testing.assert_allclose(session.run(feeds)["y"], found, atol=1e-6)


def test_an_optimised_graph_that_was_not_finished_has_no_name(
    ort, make_target, make_onnx, tmp_path, monkeypatch
):
    library, target = (
        pytest.importorskip("onnxruntime"),
        make_target(options={"save_optimized": True}),
    )

    def killed(path, options, providers):
        Path(options.optimized_model_filepath).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(library, "InferenceSession", killed)
    with pytest.raises(KeyboardInterrupt):
        ort.build(make_onnx(), target, tmp_path / "out")
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["net.onnx"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no ONNX graph"),
        (b"this is not a model", "not an ONNX model"),
        (None, "no such file"),
    ],
)
def test_a_bad_file_is_named(ort, make_target, tmp_path, content, words):
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BuildError, match=rf"bad\.onnx: .*{words}"):
        ort.build(path, make_target(), tmp_path / "out")


def test_a_truncated_model_is_refused(ort, make_target, make_onnx, tmp_path):
    path = make_onnx()
    whole = path.read_bytes()
    for part in (0.1, 0.5, 0.95):
        path.write_bytes(whole[: int(part * len(whole))])
        with pytest.raises(BuildError, match=r"net\.onnx"):
            ort.build(path, make_target(), tmp_path / "out")


def test_an_invalid_graph_is_refused(ort, make_target, make_onnx, tmp_path):
    onnx = pytest.importorskip("onnx")
    path = make_onnx()
    model = onnx.load(str(path))
    model.graph.node[1].op_type = "NoSuchOperator"
    onnx.save(model, str(path))
    with pytest.raises(BuildError, match="NoSuchOperator"):
        ort.build(path, make_target(), tmp_path / "out")


def test_a_provider_that_is_not_there_is_unusable(ort, make_target, make_onnx, tmp_path):
    target = make_target(device="cuda:0", options={"provider": "CUDAExecutionProvider"})
    found = ort.availability(target)
    if found.usable:
        pytest.skip("this machine has CUDA")
    assert found.reason
    assert "onnxruntime-gpu" in found.fix or "driver" in found.fix
    with pytest.raises((MissingBackend, BackendError)):
        ort.build(make_onnx(), target, tmp_path / "out")


@pytest.mark.parametrize(
    ("provider", "device", "expected"),
    [
        ("CPU", "cuda:0", "cpu for CPUExecutionProvider"),
        ("CUDA", "cpu", "cuda:0 for CUDAExecutionProvider"),
        ("Tensorrt", "gpu", "cuda:0 for TensorrtExecutionProvider"),
        ("OpenVINO", "gpu", "cpu for OpenVINOExecutionProvider with device_type = 'CPU'"),
    ],
)
def test_a_device_that_the_provider_does_not_compute_on_is_refused(
    make_target, provider, device, expected
):
    options = {"provider": f"{provider}ExecutionProvider"}
    told = rf"test\.toml:device: found '{device}', expected {expected}"
    with pytest.raises(ConfigError, match=told):
        registry.for_target(make_target(device=device, options=options))


def test_an_unknown_provider_is_told_the_names_there_are(ort, make_target):
    found = ort.availability(make_target(options={"provider": "OpenVINO"}))
    assert not found.usable and "pip" not in found.fix
    assert "options.provider: found 'OpenVINO', expected one of CPUExecution" in found.reason
    assert "OpenVINOExecutionProvider" in found.reason


def test_openvinos_provider_is_told_a_number_of_threads_only_where_there_is_one(make_target):
    options = {"provider": "OpenVINOExecutionProvider"}

    def settings(threads):
        target = make_target(threads=threads, options=options)
        return ort_module._providers(target, options["provider"], target.path)[0][1]

    assert settings(0) == {"device_type": "CPU"}
    assert settings(3) == {"device_type": "CPU", "num_of_threads": "3"}


def test_providers_get_the_gpu_of_the_target_and_their_libraries(
    ort, make_target, make_onnx, tmp_path, monkeypatch
):
    library = pytest.importorskip("onnxruntime")
    seen = []

    class Session:
        def __init__(self, path, options, providers):
            seen.append(providers)

        def get_providers(self):
            return [seen[-1][0][0]]

    names = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(library, "get_available_providers", lambda: names)
    monkeypatch.setattr(library, "preload_dlls", lambda: seen.append("libraries"), raising=False)
    monkeypatch.setattr(library, "InferenceSession", Session)

    def target_of(provider):
        options = {"provider": provider, "allow_fallback": True}
        return make_target(device="cuda:1", options=options)

    for provider in names[:2]:
        ort.build(make_onnx(), target_of(provider), tmp_path / "out")
        assert seen[-2] == "libraries"
        (chosen, settings), cpu = seen[-1]
        assert (chosen, settings["device_id"], cpu) == (provider, 1, names[2])
    settings = seen[1][0][1]  # TensorRT builds once, and what it built lies with the engine
    assert settings["trt_engine_cache_enable"]
    assert settings["trt_engine_cache_path"].startswith(str(tmp_path / "out"))
    assert Path(settings["trt_engine_cache_path"]).is_dir(), "the provider makes one level only"
    kept = []
    for width in (16, 8, 16):  # the provider tells engines apart by names, which these share
        ort.build(make_onnx(width), target_of(names[0]), tmp_path / "out")
        kept.append(seen[-1][0][1]["trt_engine_cache_path"])
    assert kept[0] == kept[2] != kept[1]
    monkeypatch.setattr(library, "__version__", "1.21.1")
    found = ort.availability(make_target(device="cuda:0", options={"provider": names[0]}))
    assert not found.usable and "1.21.1" in found.reason and ">=1.22" in found.fix


@pytest.mark.parametrize(
    ("here", "system", "usable", "found"),
    [
        ("10.16.1", None, True, ""),
        ("11.0.0", None, False, "11.0.0"),
        ("", "libnvinfer.so.10", True, ""),
        ("", "libnvinfer.so.8", False, "none"),
        ("", None, False, "none"),
    ],
)
def test_the_tensorrt_that_the_provider_is_linked_to_must_be_here(
    here, system, usable, found, tmp_path, monkeypatch
):
    library = tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so"
    library.parent.mkdir()
    library.write_bytes(b"\x7fELF\0libdl.so.2\0libnvinfer.so.10\0libnvonnxparser.so.10\0")
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"), __version__="1.31.1")
    monkeypatch.setattr(ort_tensorrt, "version", lambda module: here)
    monkeypatch.setattr(ort_tensorrt.ctypes.util, "find_library", lambda name: system)
    answer = ort_tensorrt.availability(package)
    assert answer.usable is usable
    if not usable:
        assert f"onnxruntime 1.31.1 needs TensorRT 10, found {found}" in answer.reason
        assert answer.fix == 'pip install "tensorrt>=10,<11"'
    library.unlink()
    assert ort_tensorrt.availability(package).usable


def test_operators_that_fall_back_are_an_error_and_named(ort, make_target, make_onnx, tmp_path):
    ort_library = pytest.importorskip("onnxruntime")
    provider = "AzureExecutionProvider"  # in the plain package; runs no ordinary operator
    if provider not in ort_library.get_available_providers():
        pytest.skip(f"no {provider} in this build")
    target = make_target(options={"provider": provider})
    with pytest.raises(BuildError, match=r"do not run on Azure.*\(Conv\)"):
        ort.build(make_onnx(), target, tmp_path / "out")
    allowed = make_target(options={"provider": provider, "allow_fallback": True})
    assert ort.build(make_onnx(), allowed, tmp_path / "out").path.is_file()


DENORMALS = """
import sys
from pathlib import Path
import numpy as np
from prune2deploy import target
from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine

profile, path = target.load(sys.argv[1]), Path(sys.argv[2])
with registry.for_target(profile).open(Engine(path, path, "ort", 0.0), profile) as session:
    result = session.run({"x": np.full(4, 1e-41, np.float32)})["y"]
sys.exit(0 if (result == 0).all() else 3)
"""


def test_denormal_numbers_count_as_zero(make_target, tmp_path):
    # In a fresh process, because only the first session of a process can set this.
    onnx = pytest.importorskip("onnx")
    tensor = onnx.helper.make_tensor_value_info
    large = onnx.numpy_helper.from_array(np.array([1e30], np.float32), "large")
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Mul", ["x", "large"], ["y"])],
        "net",
        [tensor("x", onnx.TensorProto.FLOAT, [4])],
        [tensor("y", onnx.TensorProto.FLOAT, [4])],
        [large],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "mul.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    command = [sys.executable, "-c", DENORMALS, str(make_target().path), str(path)]
    assert subprocess.run(command, check=False).returncode == 0
