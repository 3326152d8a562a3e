import json
import os
import subprocess
import sys

import pytest

from prune2deploy import target
from prune2deploy.backends import engine_store, registry
from prune2deploy.backends.base import Engine
from prune2deploy.errors import BackendError, BuildError


def pretend_engine(folder, **changed):
    folder.mkdir(parents=True, exist_ok=True)
    engine = folder / "m.engine"
    engine.write_bytes(b"plan")
    facts = {
        "module": "tensorrt_rtx",
        "version": "1.0",
        "device": "compute capability 89",
        "onnx_sha256": "a",
        "engine_sha256": engine_store.sha256(engine),
        "settings": {},
        "seconds": 1.0,
    }
    engine_store.Manifest(**{**facts, **changed}).write(engine)
    return engine


def test_manifest_round_trip_and_corrupt_engine(tmp_path):
    engine = pretend_engine(tmp_path)
    assert engine_store.read_manifest(engine).version == "1.0"
    engine.write_bytes(b"plaN")
    with pytest.raises(BackendError, match="corrupt"):
        engine_store.read_manifest(engine)


def test_missing_and_damaged_manifests_say_to_build_again(tmp_path):
    engine = pretend_engine(tmp_path)
    engine_store.manifest_path(engine).write_text('{"schema": 1, "module"')
    with pytest.raises(BackendError, match=r"damaged.*build it again"):
        engine_store.read_manifest(engine)
    engine_store.manifest_path(engine).write_text(json.dumps({"schema": 99}))
    with pytest.raises(BackendError, match="expected schema 1"):
        engine_store.read_manifest(engine)
    engine_store.manifest_path(engine).unlink()
    with pytest.raises(BackendError, match="engines of other tools"):
        engine_store.read_manifest(engine)
    engine.unlink()
    with pytest.raises(BackendError, match="no such engine"):
        engine_store.read_manifest(engine)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"version": "0.9"}, r"version 0\.9, but here it is 1\.0"),
        ({"device": "compute capability 86"}, "GPU compute capability 86"),
        ({"module": "tensorrt"}, "runtime tensorrt, but"),
    ],
)
def test_engine_of_another_version_gpu_or_runtime_is_refused(tmp_path, changed, message):
    engine = pretend_engine(tmp_path, **changed)
    manifest = engine_store.read_manifest(engine)
    here = {"module": "tensorrt_rtx", "version": "1.0", "device": "compute capability 89"}
    with pytest.raises(BackendError, match=message):
        engine_store.check_fits(engine, manifest, **here)


def test_opening_an_engine_of_another_version_is_refused(tmp_path):
    pytest.importorskip("tensorrt_rtx", exc_type=ImportError)
    rtx = target.load("trt-rtx")
    backend = registry.for_target(rtx)
    engine = pretend_engine(tmp_path, version="0.1")
    with pytest.raises(BackendError, match=r"built for tensorrt_rtx version 0\.1"):
        backend.open(Engine(engine, tmp_path / "m.onnx", "tensorrt", 0.0), rtx)


def test_lock_keeps_a_second_process_out_until_the_first_ends(tmp_path):
    code = (
        "import sys, time; from pathlib import Path\n"
        "from prune2deploy.backends.engine_store import lock\n"
        "with lock(Path(sys.argv[1]), 5): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "x.lock")],
        stdout=subprocess.PIPE,
        env=engine_store._environment(),
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with (
            pytest.raises(BuildError, match="another process"),
            engine_store.lock(tmp_path / "x.lock", 0.3),
        ):
            pass
        holder.kill()
        holder.wait()
        with engine_store.lock(tmp_path / "x.lock", 5):
            pass


def test_cache_drops_the_longest_unused_engines_only(tmp_path):
    for i, name in enumerate(("old", "mid", "new")):
        engine = tmp_path / f"{name}.engine"
        engine.write_bytes(bytes(100))
        engine.with_suffix(".log").write_text("")
        engine_store.manifest_path(engine).write_text("{}")
        os.utime(engine, (i, i))
    engine_store.trim(tmp_path, 250, keep=tmp_path / "new.engine")
    assert {p.name.split(".")[0] for p in tmp_path.iterdir()} == {"mid", "new"}
