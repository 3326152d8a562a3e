"""What goes wrong outside our code, with the real component wherever a CPU has it."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace

import onnx
import pytest
from onnx import TensorProto, helper

from prune2deploy import target, watched
from prune2deploy.backends import engine_build, engine_store, gpu_driver, registry
from prune2deploy.backends.engine_build import BuildFailed, BuildRequest
from prune2deploy.errors import BackendError, BuildError

DRIVER = """
int cuInit(unsigned flags) {{ return {init}; }}
int cuGetErrorName(int code, const char **text) {{ *text = "CUDA_ERROR_STUB"; return 0; }}
int cuDeviceGetCount(int *count) {{ *count = 2; return 0; }}
int cuDriverGetVersion(int *version) {{ *version = 11080; return 0; }}
int cuDeviceGet(int *device, int index) {{ *device = index; return 0; }}
int cuDeviceGetName(char *name, int size, int device) {{ name[0] = 'H'; name[1] = 0; return 0; }}
int cuDeviceGetAttribute(int *value, int what, int device) {{
    *value = what == 75 ? 9 : 0;
    return 0;
}}
int cuDeviceTotalMem_v2(unsigned long *bytes, int device) {{ *bytes = 1024; return 0; }}
int cuDevicePrimaryCtxRetain(void **context, int device) {{
    *context = (void *)(7L + device);
    return 0;
}}
int cuCtxSetCurrent(void *context) {{ return context == (void *)8 ? 0 : 201; }}
"""


def command(*arguments, prefix="", **where):
    """Run the command line behind a shell prefix such as a limit."""
    line = [sys.executable, "-m", "prune2deploy", *map(str, arguments)]
    return subprocess.run(
        ["bash", "-c", f'{prefix} exec "$@"', "bash", *line],
        capture_output=True,
        text=True,
        timeout=240,
        env=watched.environment(),
        **where,
    )


@pytest.fixture
def rtx(tmp_path):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    profile = target.load("trt-rtx")
    changed = {"cache": str(tmp_path / "cache"), "build_seconds": 120.0}
    return replace(profile, options=tuple({**dict(profile.options), **changed}.items()))


@pytest.fixture
def special(tmp_path):
    """A file with an operator that no runtime knows."""
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, [4]) for n in "xy")
    node = helper.make_node("Special", ["x"], ["y"], name="odd_one", domain="mine")
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    path = tmp_path / "odd.onnx"
    graph = helper.make_graph([node], "g", [x], [y])
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


# --- driver -------------------------------------------------------------------------------------


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """Compile a driver library that answers ``cuInit`` with a code of CUDA's."""
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")

    def make(init):
        library = tmp_path / f"libcuda-{init}.so"
        (tmp_path / "driver.c").write_text(DRIVER.format(init=init))
        subprocess.run(["cc", "-shared", "-o", library, tmp_path / "driver.c"], check=True)
        monkeypatch.setattr(gpu_driver, "LIBRARY", str(library))

    return make


@pytest.mark.parametrize(
    ("code", "words"),
    [(100, "sees no GPU"), (803, r"does not start: CUDA_ERROR_STUB \(803\)"), (35, r"\(35\)")],
)
def test_a_driver_without_a_gpu_or_of_the_wrong_version_is_told(driver, rtx, code, words):
    driver(code)
    known = registry.for_target(rtx).availability(rtx)
    assert not known.usable
    assert "can be built here but not run" in known.reason
    assert known.fix
    assert re.search(words, known.reason)
    assert gpu_driver.versions() == {"cuda_driver": "11.8"}


def test_a_gpu_number_that_is_not_there_is_told(driver):
    driver(0)
    assert gpu_driver.facts(3) == "there is no GPU number 3 (the driver sees 2)"


def test_the_gpu_of_the_profile_is_the_one_that_is_built_on(driver, rtx, make_onnx, monkeypatch):
    driver(0)
    gpu_driver.use(1)
    with pytest.raises(BackendError, match=r"GPU 0 cannot be used: CUDA_ERROR_STUB \(201\)"):
        gpu_driver.use(0)
    with pytest.raises(BackendError, match="no GPU number 2"):
        gpu_driver.use(2)
    options = tuple((k, v) for k, v in rtx.options if k != "compute_capability")
    second = replace(rtx, device="cuda:1", options=options)
    asked = []
    monkeypatch.setattr(
        engine_store, "obtain", lambda cache, wanted, request, *_: asked.append(request) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        registry.for_target(second).build(make_onnx(), second, rtx.path.parent)
    assert asked[0].gpu == 1 and asked[0].capability == ""


@pytest.mark.rtx
def test_a_gpu_that_the_library_does_not_know_is_named(driver, rtx, make_onnx, tmp_path):
    driver(0)
    order = BuildRequest("tensorrt_rtx", str(make_onnx()), str(tmp_path / "m.engine"))
    with pytest.raises(BuildFailed, match=r"the GPU here, H, of compute capability '90'.*75"):
        engine_build.build(order)


# --- builds -------------------------------------------------------------------------------------


@pytest.mark.rtx
def test_a_builder_that_runs_out_of_memory_leaves_the_cache_usable(
    rtx, make_onnx, tmp_path, monkeypatch
):
    real, path, backend = engine_store.command, make_onnx(), registry.for_target(rtx)
    limited = ["bash", "-c", 'ulimit -v 600000; exec "$@"', "bash"]
    monkeypatch.setattr(engine_store, "command", lambda order: [*limited, *real(order)])
    with pytest.raises(BuildError) as raised:
        backend.build(path, rtx, tmp_path / "out")
    assert str(path) in str(raised.value)
    assert re.search("not enough memory|log ends", str(raised.value))
    assert not list((tmp_path / "cache").glob("*.engine"))
    monkeypatch.setattr(engine_store, "command", real)
    assert backend.build(path, rtx, tmp_path / "out").path.stat().st_size > 1000


@pytest.mark.rtx
def test_a_segmentation_fault_with_the_runtime_loaded_is_told(
    rtx, make_onnx, tmp_path, monkeypatch
):
    code = "import tensorrt_rtx, ctypes; print('loaded', flush=True); ctypes.string_at(0)"
    monkeypatch.setattr(engine_store, "command", lambda order: [sys.executable, "-c", code])
    with pytest.raises(BuildError, match=r"crashed \(SIGSEGV\)(.|\n)*loaded"):
        registry.for_target(rtx).build(make_onnx(), rtx, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list((tmp_path / "cache").glob("*.engine"))


@pytest.mark.parametrize(("name", "words"), [("ort", "Special"), ("openvino", "Special")])
def test_an_operator_that_a_runtime_lacks_is_named(special, tmp_path, name, words):
    pytest.importorskip({"ort": "onnxruntime"}.get(name, name))
    profile = target.load(name)
    with pytest.raises(BuildError, match=words) as raised:
        registry.for_target(profile).build(special, profile, tmp_path / "out")
    assert "odd.onnx" in str(raised.value)


def test_a_full_disk_while_the_engine_is_placed_is_told_and_nothing_is_left(make_onnx, tmp_path):
    path = make_onnx(512)
    assert path.stat().st_size > 4096
    done = command("build", path, "--target", "ort", "--out", tmp_path / "o", prefix="ulimit -f 4;")
    assert done.returncode == 3, done.stderr
    assert "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert list((tmp_path / "o").iterdir()) == []


# --- the build command --------------------------------------------------------------------------


@pytest.mark.rtx
def test_build_makes_a_real_engine_and_refuses_corrupt_files(rtx, make_onnx, tmp_path):
    text = "\n".join([
        'backend = "tensorrt"', 'device = "cuda:0"', "[options]", 'module = "tensorrt_rtx"',
        'compute_capability = "89"', f'cache = "{tmp_path / "cache"}"',
    ])  # fmt: skip
    (tmp_path / "mine.toml").write_text(text)
    here = {"cwd": tmp_path}
    path = make_onnx()
    out = ("--target", "./mine.toml", "--out", "o")
    done = command("build", path, *out, "--precision", "fp16", **here)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o/net.fp16.engine").stat().st_size > 1000
    assert engine_store.read_manifest(tmp_path / "o/net.fp16.engine").version
    path.write_bytes(path.read_bytes()[:-200])
    done = command("build", path, *out, **here)
    assert done.returncode == 2 and "net.onnx" in done.stderr
    done = command("build", tmp_path / "none.onnx", *out, **here)
    assert done.returncode == 2 and "no such file" in done.stderr
    assert not (tmp_path / "o/net.engine").exists()


def test_a_target_that_can_be_built_but_not_run_says_so(rtx, monkeypatch, capsys):
    from prune2deploy import cli

    monkeypatch.setattr(gpu_driver, "LIBRARY", "libcuda-that-is-not-there.so.1")
    assert cli.run(["targets"]) == 0
    lines = capsys.readouterr().out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("trt-rtx"))
    assert "can build" in lines[at]
    assert "NVIDIA driver" in lines[at + 1] and "fix:" in lines[at + 2]


def test_a_runtime_that_is_missing_for_building_is_exit_3(make_onnx, monkeypatch, capsys):
    import importlib.util

    from prune2deploy import cli

    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if "tensorrt" in name else real(name)
    )
    assert cli.run(["build", str(make_onnx()), "--target", "trt"]) == 3
    told = capsys.readouterr().err
    assert 'pip install "prune2deploy[trt]"' in told and "Traceback" not in told


def test_openvino_is_imported_without_what_calls_home():
    pytest.importorskip("openvino")
    code = (
        "import sys; from prune2deploy.backends import registry; "
        "print(registry.get('openvino').versions(), 'openvino_telemetry' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=watched.environment(),
        check=True,
    )
    assert done.stdout.rstrip().endswith("False")
