import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn

from prune2deploy import target, watched
from prune2deploy.backends import (
    devices,
    engine_build,
    engine_store,
    gpu_driver,
    gpu_memory,
    registry,
    tensorrt,
)
from prune2deploy.backends.engine_build import BuildRequest
from prune2deploy.backends.tensorrt_session import layer_timings
from prune2deploy.errors import BuildError, ConfigError, MissingBackend
from prune2deploy.exporting import precision, simplify
from prune2deploy.exporting.export import to_onnx


class Residual(nn.Module):
    """A small residual net with the odd widths that pruning leaves."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3, 2, 1), nn.BatchNorm2d(24), nn.ReLU())
        self.a = nn.Sequential(nn.Conv2d(24, 40, 3, 1, 1), nn.BatchNorm2d(40), nn.ReLU())
        self.b = nn.Conv2d(40, 24, 3, 1, 1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        x = self.stem(x)
        return self.head(torch.relu(x + self.b(self.a(x))).mean((2, 3)))


@pytest.fixture
def rtx(tmp_path):
    return with_options(target.load("trt-rtx"), cache=str(tmp_path / "cache"), build_seconds=120.0)


@pytest.fixture
def backend(rtx):
    return registry.for_target(rtx)


@pytest.fixture
def model(tmp_path):
    path = to_onnx(Residual(), (torch.randn(1, 3, 32, 32),), tmp_path / "raw.onnx")
    return simplify.simplify(path, tmp_path / "net.onnx").path


def with_options(profile, **changed):
    return replace(profile, options=tuple({**dict(profile.options), **changed}.items()))


def needs_rtx():
    return pytest.importorskip(
        "tensorrt_rtx", reason="tensorrt_rtx is not installed", exc_type=ImportError
    )


def no_gpu(monkeypatch):
    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda-that-is-not-there.so.1")


# --- really built -------------------------------------------------------------------------------


@pytest.mark.rtx
def test_fp32_fp16_and_int8_are_really_built(backend, rtx, model, tmp_path):
    needs_rtx()
    half = precision.to_fp16(model, tmp_path / "half.onnx").path
    rows = [((torch.randn(1, 3, 32, 32),), None) for _ in range(4)]
    quantised = precision.to_int8(model, tmp_path / "int8.onnx", rows).path
    both = precision.to_fp16(quantised, tmp_path / "int8_half.onnx").path
    sizes = {}
    for file in (model, half, quantised, both):
        engine = backend.build(file, rtx, tmp_path / "out")
        sizes[file.stem] = engine.path.stat().st_size
        assert engine.log is not None
        assert "Engine generation completed" in engine.log.read_text()
        assert engine_store.read_manifest(engine.path).module == "tensorrt_rtx"
    assert sizes["net"] > 10_000
    assert len(set(sizes.values())) == 4, "each precision must give an engine of its own"


@pytest.mark.rtx
def test_free_batch_is_built_for_its_range(backend, rtx, tmp_path):
    needs_rtx()
    path = to_onnx(
        Residual(), (torch.randn(2, 3, 32, 32),), tmp_path / "free.onnx", dynamic_batch=True
    )
    engine = backend.build(path, with_options(rtx, batch_opt=4, batch_max=16), tmp_path / "out")
    assert engine_store.read_manifest(engine.path).settings["batch"] == [1, 4, 16]


@pytest.mark.rtx
def test_second_build_comes_from_the_cache_and_other_settings_do_not(
    backend, rtx, model, tmp_path, monkeypatch
):
    needs_rtx()
    first = backend.build(model, rtx, tmp_path / "a")
    built = []
    real = engine_store.run_builder
    monkeypatch.setattr(
        engine_store, "run_builder", lambda *args: built.append(args) or real(*args)
    )
    second = backend.build(model, rtx, tmp_path / "b")
    assert built == []
    assert second.path.read_bytes() == first.path.read_bytes()
    backend.build(model, with_options(rtx, compute_capability="86"), tmp_path / "c")
    assert len(built) == 1
    corrupt = next((tmp_path / "cache").glob("*.engine"))
    for engine in (tmp_path / "cache").glob("*.engine"):
        engine.write_bytes(b"garbage")
    again = backend.build(model, rtx, tmp_path / "d")
    assert len(built) == 2, f"a corrupt engine ({corrupt.name}) must be built again"
    assert again.path.read_bytes() == first.path.read_bytes()


@pytest.mark.rtx
def test_unsupported_operator_is_named_with_its_node(backend, rtx, tmp_path):
    needs_rtx()
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])
    node = helper.make_node("Special", ["x"], ["y"], name="odd_one", domain="mine")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    path = tmp_path / "odd.onnx"
    onnx.save(
        helper.make_model(helper.make_graph([node], "g", [x], [y]), opset_imports=opsets), path
    )
    with pytest.raises(BuildError, match=r"'Special' at node 'odd_one'"):
        backend.build(path, rtx, tmp_path / "out")
    assert not list((tmp_path / "cache").glob("*.engine"))


@pytest.mark.rtx
def test_unknown_compute_capability_names_the_choices(backend, rtx, model, tmp_path):
    needs_rtx()
    with pytest.raises(BuildError, match=r"'87' is not known to tensorrt_rtx.*89"):
        backend.build(model, with_options(rtx, compute_capability="87"), tmp_path / "out")


@pytest.mark.rtx
def test_an_engine_is_for_one_gpu_and_can_be_captured_where_asked(monkeypatch):
    trt = needs_rtx()
    here = gpu_driver.GpuFacts("a GPU", "75", 1 << 33)
    monkeypatch.setattr(gpu_driver, "facts", lambda index: here)
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    for named, capture in (("", True), ("89", False)):
        config = builder.create_builder_config()
        request = BuildRequest("tensorrt_rtx", "", "", capability=named, capture=capture)
        engine_build._configure(trt, config, request)
        assert config.num_compute_capabilities == 1
        found = config.get_compute_capability(0)
        assert found == getattr(trt.ComputeCapability, f"SM{named or here.capability}")
        assert config.get_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION) is capture


@pytest.mark.rtx
def test_free_image_size_is_refused_by_name(backend, rtx, tmp_path):
    needs_rtx()
    x = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [1, 3, "h", "w"])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, "h", "w"])
    graph = helper.make_graph([helper.make_node("Relu", ["pixels"], ["y"])], "g", [x], [y])
    path = tmp_path / "free.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), path)
    with pytest.raises(BuildError, match=r"'pixels'.*only the batch"):
        backend.build(path, rtx, tmp_path / "out")


BUILD = """
import json, sys
from pathlib import Path
from prune2deploy.backends import registry
from prune2deploy.target import Target
profile = Target.from_dict(json.loads(sys.argv[1]))
registry.for_target(profile).build(Path(sys.argv[2]), profile, Path(sys.argv[3]))
"""


@pytest.mark.rtx
def test_two_processes_that_build_the_same_engine_get_the_same_whole_file(rtx, model, tmp_path):
    needs_rtx()
    profile, env = json.dumps(rtx.to_dict()), watched.environment()
    builders = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD, profile, str(model), str(tmp_path / name)], env=env
        )
        for name in ("a", "b")
    ]
    assert [builder.wait(120) for builder in builders] == [0, 0]
    first, second = ((tmp_path / name / "net.engine").read_bytes() for name in ("a", "b"))
    assert first == second
    assert len(list((tmp_path / "cache").glob("*.engine"))) == 1
    assert not list((tmp_path / "cache").glob(".part-*"))


@pytest.mark.rtx
def test_engine_cannot_be_opened_without_a_gpu_and_says_so(
    backend, rtx, model, tmp_path, monkeypatch
):
    needs_rtx()
    no_gpu(monkeypatch)
    known = backend.availability(rtx)
    assert not known.usable
    assert "can be built here but not run" in known.reason
    assert backend.can_build(rtx).usable
    engine = backend.build(model, rtx, tmp_path / "out")
    with pytest.raises(MissingBackend, match="NVIDIA driver"):
        backend.open(engine, rtx)


# --- the builder's process ----------------------------------------------------------------------


def run_as(monkeypatch, code):
    monkeypatch.setattr(
        engine_store, "command", lambda order: [sys.executable, "-c", code, str(order)]
    )


def request(tmp_path):
    return BuildRequest("tensorrt_rtx", "model.onnx", str(tmp_path / "m.engine"))


@pytest.mark.parametrize(
    ("code", "told"),
    [
        (
            "import os; os.write(1, b'last words\\n'); os.kill(os.getpid(), 11)",
            r"crashed \(SIGSEGV\)(.|\n)*last words",
        ),
        ("import os; os.kill(os.getpid(), 9)", "want of memory"),
        ("raise SystemExit(7)", "code 7 and no answer"),
    ],
)
def test_builder_that_dies_is_an_error_that_says_how(tmp_path, monkeypatch, code, told):
    run_as(monkeypatch, code)
    with pytest.raises(BuildError, match=told):
        engine_store.run_builder(request(tmp_path), tmp_path, 30)


def test_builder_that_hangs_is_stopped_with_what_it_started(tmp_path, monkeypatch):
    run_as(
        monkeypatch,
        "import subprocess, sys, time; from pathlib import Path\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"Path({str(tmp_path / 'child')!r}).write_text(str(child.pid)); time.sleep(60)",
    )
    with pytest.raises(BuildError, match="longer than 2 s"):
        engine_store.run_builder(request(tmp_path), tmp_path, 2)
    pid = int((tmp_path / "child").read_text())
    time.sleep(0.2)
    state = Path(f"/proc/{pid}/stat")
    assert not state.exists() or state.read_text().rsplit(")", 1)[1].split()[0] == "Z"


def test_a_builder_does_not_outlive_the_process_that_wants_its_engine(tmp_path):
    """The builder's folder, which lies in the cache, goes with it."""
    folder = tmp_path / "build"
    folder.mkdir()
    code = (
        "import sys; from pathlib import Path\n"
        "from prune2deploy.backends import engine_store\n"
        "from prune2deploy.backends.engine_build import BuildRequest\n"
        "from prune2deploy import watched\n"
        "engine_store.command = lambda order: watched.command('hanging', order)\n"
        "order = BuildRequest('tensorrt_rtx', 'm.onnx', sys.argv[1] + '/m.engine')\n"
        "engine_store.run_builder(order, Path(sys.argv[1]), 300)\n"
    )
    (tmp_path / "hanging.py").write_text(
        f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "time.sleep(300)\n"
    )
    env = watched.environment()
    env["PYTHONPATH"] += f":{tmp_path}"
    wanting = subprocess.Popen([sys.executable, "-c", code, str(folder)], env=env)
    deadline = time.monotonic() + 60
    while not ((tmp_path / "pid").exists() and (tmp_path / "pid").read_text()):
        assert time.monotonic() < deadline and wanting.poll() is None
        time.sleep(0.05)
    wanting.kill()
    wanting.wait()
    state = Path(f"/proc/{int((tmp_path / 'pid').read_text())}/stat")
    while state.exists() and state.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not folder.exists()


def test_failed_build_leaves_the_cache_as_it_was(tmp_path, monkeypatch):
    run_as(monkeypatch, "import os; os.kill(os.getpid(), 11)")
    cache = tmp_path / "cache"
    wanted = engine_store.Manifest("tensorrt_rtx", "1", "x", "a", "", {}, 0.0)
    with pytest.raises(BuildError):
        engine_store.obtain(cache, wanted, request(tmp_path), tmp_path / "o.engine", 30)
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


@pytest.mark.rtx
def test_builder_that_cannot_write_its_engine_says_so(tmp_path, rtx, model, monkeypatch):
    needs_rtx()
    real = engine_store.command
    monkeypatch.setattr(
        engine_store,
        "command",
        lambda order: ["bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *real(order)],
    )
    with pytest.raises(BuildError, match=r"File too large|No space"):
        registry.for_target(rtx).build(model, rtx, tmp_path / "out")
    assert not list((tmp_path / "cache").glob("*.engine"))


def test_build_request_survives_its_file():
    order = BuildRequest("tensorrt", "a.onnx", "b.engine", batch=(1, 2, 3), timing_cache="t")
    assert BuildRequest.from_json(order.to_json()) == order


def test_a_damaged_timing_cache_counts_as_empty_and_its_complaint_is_no_failure(tmp_path):
    trt = needs_rtx()
    heard = engine_build._Heard(trt)

    class Config:
        def create_timing_cache(self, data):
            if data == b"garbage":
                heard.logger.log(trt.ILogger.Severity.ERROR, "the cache is damaged")
                return None
            return data

        def set_timing_cache(self, cache, ignore_mismatch):
            return not ignore_mismatch

    (tmp_path / "timing.bin").write_bytes(b"garbage")
    assert engine_build._load_timing_cache(Config(), str(tmp_path / "timing.bin")) == b""
    with pytest.raises(engine_build.BuildFailed, match="damaged"):
        heard.check("reading")
    heard.forget()
    heard.check("reading")
    assert engine_build._load_timing_cache(Config(), "") is None


def test_tf32_is_held_to_its_own_tolerance_and_only_where_it_is_used(make_target):
    def judged(name, **changed):
        profile = replace(target.load(name), **changed)
        return registry.for_target(profile).arithmetic(profile)

    assert judged("trt") == judged("trt-rtx") == judged("torch-cuda") == "tf32"
    assert judged("ort-trt", precision="fp32") == "tf32"
    exact = with_options(target.load("trt"), tf32=False)
    assert registry.for_target(exact).arithmetic(exact) == "fp32"
    assert judged("ort") == judged("ort-cuda") == judged("torch") == judged("openvino") == "fp32"
    assert (judged("trt-fp16"), judged("trt-int8")) == ("fp16", "int8")


# --- what is there and what is not --------------------------------------------------------------


@pytest.mark.parametrize("name", ["trt", "trt-fp16", "trt-int8", "trt-rtx"])
def test_without_a_gpu_every_profile_says_what_is_missing_and_the_fix(name, monkeypatch):
    no_gpu(monkeypatch)
    profile = target.load(name)
    known = registry.for_target(profile).availability(profile)
    assert not known.usable
    assert "NVIDIA driver" in known.reason
    assert known.fix


def test_without_the_package_the_line_that_installs_it_is_given(monkeypatch, tmp_path):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    profile = target.load("trt")
    backend = registry.for_target(profile)
    known = backend.availability(profile)
    assert "tensorrt is not installed" in known.reason
    assert known.fix == 'pip install "prune2deploy[trt]"'
    with pytest.raises(MissingBackend, match=r"prune2deploy\[trt\]"):
        backend.build(tmp_path / "m.onnx", profile, tmp_path)
    (tmp_path / "nv_tegra_release").touch()
    monkeypatch.setattr(devices, "JETSON", tmp_path / "nv_tegra_release")
    assert "JetPack" in backend.availability(profile).fix


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"memory": "cupy"}, "memory: found 'cupy', expected one of auto"),
        ({"cache": "~nobody_here/x"}, "cache: found '~nobody_here/x', whose home folder is not"),
        ({"module": "tensorflow"}, "module: found 'tensorflow', expected one of tensorrt, "),
        ({"module": "tensorrt", "compute_capability": "89"}, "capability: found '89', .* none"),
        ({"compute_capability": "8.9"}, "capability: found '8.9', expected two .* digits"),
        ({"workspace_mb": -5}, "workspace_mb: found -5, expected 0 or more"),
        ({"cache_mb": -1}, "cache_mb: found -1, expected 0 or more"),
        ({"build_seconds": 0.0}, "build_seconds: found 0.0, expected 1 or more"),
        ({"build_seconds": float("nan")}, "build_seconds: found nan, expected 1 or more"),
        ({"batch_opt": 9}, r"batch_max: found 8, .*\(1, 9, 8\)"),
        ({"batch_min": 0}, r"batch_max: found 8, .*\(0, 1, 8\)"),
    ],
)
def test_values_that_cannot_be_meant_are_refused_by_name(rtx, changed, told):
    with pytest.raises(ConfigError, match=rf"trt-rtx\.toml:options\..*{told}"):
        registry.for_target(with_options(rtx, **changed))


def test_another_device_than_a_gpu_is_refused(rtx):
    with pytest.raises(ConfigError, match=r":device: found 'cpu', expected cuda:0 for .*tensorrt"):
        registry.for_target(replace(rtx, device="cpu"))


def test_a_cuda_graph_makes_other_engines_of_tensorrt_for_rtx_alone(rtx, model):
    def key(profile):
        request = tensorrt._request(model, profile, Path())
        return tensorrt._wanted(model, profile, request).key

    plain = target.load("trt")
    assert key(plain) == key(with_options(plain, cuda_graph=False))
    assert key(rtx) != key(with_options(rtx, cuda_graph=False))


def test_a_build_that_fails_for_the_sake_of_a_graph_says_how_to_do_without():
    """The library is a stand-in: nothing small enough for a test is known to fail so."""
    network = SimpleNamespace(num_inputs=0)
    config = SimpleNamespace(set_flag=lambda flag: None, set_compute_capability=lambda *a: True)
    builder = SimpleNamespace(
        create_network=lambda flags: network,
        create_builder_config=lambda: config,
        build_serialized_network=lambda network, config: None,
    )
    trt = SimpleNamespace(
        Builder=lambda logger: builder,
        OnnxParser=lambda *a: SimpleNamespace(parse_from_file=lambda path: True),
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        ProfilingVerbosity=SimpleNamespace(DETAILED=1),
        BuilderFlag=SimpleNamespace(TF32=1, REQUIRE_USER_ALLOCATION=2),
        ComputeCapability=SimpleNamespace(__members__={"SM89": 89}),
    )
    heard = SimpleNamespace(
        logger=None, check=lambda step: None, forget=lambda: None, text=lambda: "no room"
    )
    for capture in (True, False):
        order = BuildRequest("tensorrt_rtx", "m.onnx", "m.engine", "89", capture=capture)
        with pytest.raises(engine_build.BuildFailed, match="no room") as raised:
            engine_build._build(trt, heard, order)
        assert ("cuda_graph = false" in str(raised.value)) is capture


def test_what_the_library_says_to_a_value_is_an_answer(tmp_path, monkeypatch, capsys):
    def refuse(request):
        raise TypeError("incompatible function arguments")

    monkeypatch.setattr(engine_build, "build", refuse)
    order = BuildRequest("tensorrt_rtx", "m.onnx", str(tmp_path / "m.engine"))
    (tmp_path / "order.json").write_text(order.to_json())
    assert engine_build.main([str(tmp_path / "order.json")]) == 1
    told = json.loads((tmp_path / engine_build.ANSWER).read_text())["error"]
    assert told == "tensorrt_rtx: TypeError: incompatible function arguments"
    assert "Traceback" in capsys.readouterr().err, "the log has it whole"


def test_memory_libraries_are_asked_for_by_name(monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gpu_memory.installed() == ()
    assert "pip install" in gpu_memory.availability("auto").fix
    with pytest.raises(MissingBackend, match="none is installed"):
        gpu_memory.choose("auto", 0)


def test_every_memory_library_that_fails_is_quoted(monkeypatch):
    def broken(index):
        raise OSError("the driver is too old")

    monkeypatch.setattr(gpu_memory, "PROVIDERS", {"torch": ("torch", broken)})
    with pytest.raises(MissingBackend, match="torch: OSError: the driver is too old"):
        gpu_memory.choose("auto", 0)


def test_profiler_times_are_joined_with_the_inspectors_shapes():
    inspected = json.dumps(
        {
            "Layers": [
                {
                    "Name": "conv1 + relu1",
                    "LayerType": "CaskConvolution",
                    "Inputs": [{"Name": "x", "Dimensions": [1, 3, 32, 32]}],
                    "Outputs": [{"Name": "y", "Dimensions": [1, 24, 16, 16]}],
                }
            ]
        }
    )
    conv, other = layer_timings(inspected, {"conv1 + relu1": 1500.0, "Reformat": 10.0})
    assert conv.kind == "CaskConvolution"
    assert conv.input_shapes == ((1, 3, 32, 32),)
    assert conv.output_shapes == ((1, 24, 16, 16),)
    assert (other.name, other.ns, other.output_shapes) == ("Reformat", 10.0, ())
    assert np.isclose(conv.ns, 1500.0)


def test_gpu_checks_say_that_there_is_no_gpu_and_end_with_3(tmp_path):
    if not isinstance(gpu_driver.facts(0), str):
        pytest.skip("there is a GPU here: run tools/gpu_checks.py itself")
    tool = Path(__file__).resolve().parents[2] / "tools" / "gpu_checks.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--target", "trt-rtx", "--out", str(tmp_path / "r.json")],
        env=watched.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert "nothing was checked" in done.stderr
    assert done.stdout == ""
    told = json.loads((tmp_path / "r.json").read_text())["targets"]["trt-rtx"]
    assert told["skipped"] in done.stderr


# --- the tool that a machine with a GPU runs ----------------------------------------------------


def gpu_checks(tmp_path, *arguments):
    """Run the tool; its exit code and its report."""
    out = tmp_path / "report.json"
    tool = Path(__file__).resolve().parents[2] / "tools" / "gpu_checks.py"
    done = subprocess.run(
        [sys.executable, str(tool), "--out", str(out), *arguments],
        env=watched.environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    return done, json.loads(out.read_text())["targets"]["ort"]["checks"]


def test_gpu_checks_are_real_checks_each_by_itself_and_go_on_where_they_ended(tmp_path):
    pytest.importorskip("onnxruntime")
    here = ("--target", "ort", "no-such-target", "--only", "fp32", "int8")
    done, found = gpu_checks(tmp_path, *here, "--seconds", "0.2")
    assert done.returncode == 1 and "no-such-target" in done.stderr
    assert [found[name]["result"] for name in ("fp32", "int8")] == ["crashed"] * 2
    assert "within 0.2 s" in found["fp32"]["error"] and "log" in found["fp32"]
    done, found = gpu_checks(tmp_path, "--target", "ort", "--only", "fp31")
    assert done.returncode == 2 and "no check fp31; there are fp32" in done.stderr
    report = tmp_path / "report.json"  # of a time when the target was not usable
    report.write_text(json.dumps({"schema": 2, "targets": {"ort": {"skipped": "no driver"}}}))
    done, found = gpu_checks(tmp_path, *here, "--minutes", "0", "--resume")
    assert "skipped" not in json.loads(report.read_text())["targets"]["ort"]
    assert done.returncode == 1
    assert {found[name]["result"] for name in ("fp32", "int8")} == {"not run"}
    done, found = gpu_checks(tmp_path, *here, "--resume")
    assert done.returncode == 0, done.stderr
    assert [found[name]["result"] for name in ("fp32", "int8")] == ["passed"] * 2
    assert found["int8"]["engine_bytes"] < 0.5 * found["fp32"]["engine_bytes"]
    assert found["fp32"]["layers"] > 5 and found["fp32"]["wall_p50_ms"] > 0
