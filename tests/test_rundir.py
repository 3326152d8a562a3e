"""Files in a run directory are whole or absent; one run, one folder, one process."""

import errno
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from prune2deploy.errors import ConfigError
from prune2deploy.rundir import (
    KEYS,
    RunDir,
    explain,
    free_name,
    latest_name,
    read_manifest,
)

WHO = {"model": "m", "budget": {"speedup": 1.5}}
FACTS = dict.fromkeys(KEYS[1:-1], 1)


def begun(path, identity):
    """A run that has finished its first step."""
    with RunDir(path, identity) as run:
        run.journal.open_session()
        run.journal.write("step", 1)


def test_manifest_lists_every_artefact_with_size_and_hash(tmp_path):
    with RunDir(tmp_path / "r", WHO) as run:
        run.write_text("plan.json", "{}")
        run.write_text("raw/a.json", "[1]")
        run.write_text("builds/1/model.onnx", "working file")
        run.finish(FACTS)
    manifest = read_manifest(tmp_path / "r")
    assert list(manifest) == list(KEYS)
    listed = {a["path"]: a for a in manifest["artefacts"]}
    assert set(listed) == {"plan.json", "raw/a.json", "run.json"}
    for name, artefact in listed.items():
        data = (tmp_path / "r" / name).read_bytes()
        assert artefact["bytes"] == len(data)
        assert artefact["sha256"] == hashlib.sha256(data).hexdigest()


def test_what_fails_while_written_leaves_the_old_file_whole(tmp_path):
    with RunDir(tmp_path, WHO) as run:
        run.write_text("a", "old")
        with pytest.raises(KeyboardInterrupt), run.place("a") as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt
        assert (tmp_path / "a").read_text() == "old"
        assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "a", "run.json"]


def test_what_a_killed_process_left_is_removed_on_resume(tmp_path):
    begun(tmp_path, WHO)
    (tmp_path / "builds/1").mkdir(parents=True)
    (tmp_path / "builds/1/x").write_text("done")
    (tmp_path / "builds/1/.part-abc").mkdir()
    (tmp_path / "builds/1/.part-abc/model.onnx").write_text("half")
    with RunDir(tmp_path, WHO, resume=True):
        assert [p.name for p in (tmp_path / "builds/1").iterdir()] == ["x"]


def test_the_same_run_needs_resume_and_another_run_is_refused(tmp_path):
    begun(tmp_path, WHO)
    with pytest.raises(ConfigError, match="--resume"):
        RunDir(tmp_path, WHO)
    with pytest.raises(ConfigError, match=r"another run \(model: 'm' there, 'n' here\)"):
        RunDir(tmp_path, {**WHO, "model": "n"}, resume=True)
    begun(tmp_path / "nested", {"model": {"name": "m", "seed": 0}})
    with pytest.raises(ConfigError, match=r"run \(model\.name: 'm' there, 'n' here\)"):
        RunDir(tmp_path / "nested", {"model": {"name": "n", "seed": 0}}, resume=True)


def test_a_folder_with_other_files_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match=r"thesis\.tex"):
        RunDir(tmp_path, WHO, resume=True)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_second_process_is_refused_until_the_first_ends(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom prune2deploy.rundir import RunDir\n"
        f"held = RunDir(Path(sys.argv[1]), {WHO!r})\nprint('held', flush=True)\nsys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(ConfigError, match="in progress"):
            RunDir(tmp_path, WHO, resume=True)
        other.kill()
    with RunDir(tmp_path, WHO, resume=True):
        pass


@pytest.mark.parametrize("where", ["file", "file/below", "/proc/nothing/here"])
def test_a_place_that_cannot_be_written_is_named(tmp_path, where):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot be written"):
        RunDir(tmp_path / where, WHO)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path):
    with RunDir(tmp_path, WHO) as run:
        with pytest.raises(ConfigError, match="disk is full"), run.place("model.onnx") as temporary:
            temporary.symlink_to("/dev/full")
            temporary.write_text("x")
        assert not (tmp_path / "model.onnx").exists()
        assert not list(tmp_path.glob(".part-*"))
    told = str(explain(OSError(errno.ENOSPC, ""), tmp_path))
    assert "free some space, then repeat the command (run and sweep go on" in told


def test_manifest_of_no_run_of_garbage_and_of_another_schema(tmp_path):
    with pytest.raises(ConfigError, match=r"found no manifest\.json"):
        read_manifest(tmp_path)
    for odd in ("[]", '{"schema": 1}', '{"schema": 1, "artefacts": [1]}'):
        (tmp_path / "manifest.json").write_text(odd)
        with pytest.raises(ConfigError, match="not a manifest"):
            read_manifest(tmp_path)
    (tmp_path / "manifest.json").write_text(json.dumps({"schema": 7}))
    with pytest.raises(ConfigError, match="schema 7"):
        read_manifest(tmp_path)


def test_a_manifest_never_holds_what_json_lacks(tmp_path):
    with RunDir(tmp_path, WHO) as run:
        with pytest.raises(ValueError, match="JSON compliant"):
            run.finish({**FACTS, "seconds": float("nan")})
        assert not (tmp_path / "manifest.json").exists()


def test_names_count_up_and_the_latest_of_the_same_run_is_found(tmp_path):
    assert latest_name(tmp_path, "r", WHO) == tmp_path / "r"
    for seed in (0, 1, 0, 2):
        begun(free_name(tmp_path, "r"), {**WHO, "seed": seed})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r", "r-2", "r-3", "r-4"]
    assert latest_name(tmp_path, "r", {**WHO, "seed": 0}) == tmp_path / "r-3"
    assert latest_name(tmp_path, "r", {**WHO, "seed": 1}) == tmp_path / "r-2"
    assert latest_name(tmp_path, "r", {**WHO, "seed": 7}) == tmp_path / "r-4"


def test_a_run_that_finished_no_step_makes_way(tmp_path):
    with RunDir(tmp_path / "r", WHO) as run:
        run.journal.open_session()
        run.write_text("builds/0/half.onnx", "a working file")
        assert free_name(tmp_path, "r") == tmp_path / "r-2"  # it is still in progress
    assert free_name(tmp_path, "r") == tmp_path / "r"
    other = {**WHO, "model": "n"}
    begun(tmp_path / "r", other)
    assert not (tmp_path / "r/builds").exists()
    assert json.loads((tmp_path / "r/run.json").read_text()) == other
    assert free_name(tmp_path, "r") == tmp_path / "r-2"
    (tmp_path / "s").mkdir()
    assert free_name(tmp_path, "s") == tmp_path / "s-2"  # not ours to take unasked


def test_a_folder_that_only_looks_like_a_run_is_left_alone(tmp_path):
    for name in ("builds/mine.onnx", "run.json"):
        (tmp_path / "r" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "r" / name).write_text("{}")
    assert free_name(tmp_path, "r") == tmp_path / "r-2"
    with pytest.raises(ConfigError, match="another run"):
        RunDir(tmp_path / "r", WHO)
    with RunDir(tmp_path / "s", WHO) as run:
        run.write_text("report.json", "{}")
    with pytest.raises(ConfigError, match="another run"):
        RunDir(tmp_path / "s", {**WHO, "model": "n"})
    assert (tmp_path / "r/builds/mine.onnx").exists() and (tmp_path / "s/report.json").exists()


def test_a_manifest_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "manifest.json").write_text("mine")
    with pytest.raises(ConfigError, match=r"no run \(manifest\.json"):
        RunDir(tmp_path, WHO)
    assert (tmp_path / "manifest.json").read_text() == "mine"


def test_a_gap_in_the_numbers_hides_no_run(tmp_path):
    (tmp_path / "r").write_text("a file")
    begun(tmp_path / "r-2", WHO)
    begun(tmp_path / "r-10", WHO)
    begun(tmp_path / "r-x", WHO)
    assert latest_name(tmp_path, "r", WHO) == tmp_path / "r-10"
    assert free_name(tmp_path, "r") == tmp_path / "r-3"
