import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prune2deploy import atomic, target, watched
from prune2deploy.backends import engine_store, registry
from prune2deploy.backends.base import Availability, Engine
from prune2deploy.backends.engine_build import BuildRequest
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
        "engine_sha256": atomic.sha256(engine),
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
        env=watched.environment(),
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
    left = {p.name for p in tmp_path.iterdir() if p.suffix != ".lock"}
    assert left == {
        f"{n}{end}" for n in ("mid", "new") for end in (".engine", ".engine.json", ".log")
    }


WANTED = engine_store.Manifest("tensorrt_rtx", "1", "x", "a", "", {}, 0.0)
REQUEST = BuildRequest("tensorrt_rtx", "m.onnx", "")


@pytest.fixture
def builder(monkeypatch):
    """Builds in place of the real one: writes a little; the list has one entry per build."""
    built = []

    def run(request, folder, seconds):
        built.append(request)
        Path(request.engine).write_bytes(b"plan")
        (folder / "build.log").write_text("built")
        return {"seconds": 1.0}

    monkeypatch.setattr(engine_store, "run_builder", run)
    return built


def test_an_engine_is_placed_while_no_other_process_may_drop_it(tmp_path, builder, monkeypatch):
    """Another process trims the cache at the worst moment: between the copies of one engine."""
    cache, copy = tmp_path / "cache", shutil.copyfile
    code = (
        "import sys; from pathlib import Path\n"
        "from prune2deploy.backends.engine_store import trim\n"
        "trim(Path(sys.argv[1]), 0, Path('other.engine'))"
    )

    def trimmed(source, target):
        trimming = [sys.executable, "-c", code, str(cache)]
        subprocess.run(trimming, env=watched.environment(), check=True)
        return copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", trimmed)
    cached = engine_store.obtain(cache, WANTED, REQUEST, tmp_path / "out/net.fp16.engine", 30)
    monkeypatch.undo()
    assert engine_store.read_manifest(tmp_path / "out/net.fp16.engine").device == "x"
    assert (tmp_path / "out/net.fp16.build.log").read_text() == "built"
    assert cached.is_file()
    engine_store.trim(cache, 0, keep=cached)
    assert cached.is_file()
    engine_store.trim(cache, 0, keep=tmp_path / "other.engine")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_engines_that_vanish_while_the_cache_is_trimmed_are_no_failure(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / f"{name}.engine").write_bytes(bytes(100))
    real = Path.glob

    def stale(folder, pattern):
        found = list(real(folder, pattern))
        (tmp_path / "a.engine").unlink()
        return found

    monkeypatch.setattr(Path, "glob", stale)
    engine_store.trim(tmp_path, 50, keep=tmp_path / "none.engine")
    assert not (tmp_path / "b.engine").exists()


@pytest.mark.parametrize("lost", [".log", ".engine.json", ".engine"])
def test_an_entry_of_the_cache_that_lacks_a_part_is_built_again(tmp_path, builder, lost):
    out = tmp_path / "net.engine"
    cached = engine_store.obtain(tmp_path / "cache", WANTED, REQUEST, out, 30)
    engine_store.obtain(tmp_path / "cache", WANTED, REQUEST, out, 30)
    assert len(builder) == 1
    cached.with_suffix(lost).unlink()
    engine_store.obtain(tmp_path / "cache", WANTED, REQUEST, out, 30)
    assert len(builder) == 2


@pytest.mark.parametrize(
    ("number", "told"), [(errno.ENOSPC, "free space in"), (errno.EACCES, "expected to write in")]
)
def test_only_a_full_disk_is_told_to_be_full(
    tmp_path, make_onnx, make_target, monkeypatch, number, told
):
    def refused(*arguments):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(engine_store, "obtain", refused)
    backend = registry.get("tensorrt")
    monkeypatch.setattr(type(backend), "can_build", lambda self, target: Availability(True))
    profile = make_target("tensorrt", device="cuda:0")
    with pytest.raises(BuildError, match=rf"cannot be written: .*{told} "):
        backend.build(make_onnx(), profile, tmp_path / "out")
