"""What a run leaves: files that stand alone and agree with one another, or that are not there."""

import contextlib
import hashlib
import json
import os
import resource
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import commands, summary
from prune2deploy.backends import onnx_file
from prune2deploy.errors import ConfigError, ExportError
from prune2deploy.exporting import export, program
from prune2deploy.measure import samples
from prune2deploy.progress import silent
from prune2deploy.report import write
from prune2deploy.rundir import RunDir, read_manifest
from prune2deploy.search import candidate

from .formula import formula_profile

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 64, 3), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8)).eval()


@pytest.fixture
def run(net, tmp_path):
    """Prune the net on a runtime whose latency is a formula."""
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile(fixed_ns=2000.0))

    def begin(**more):
        common = {"target": path, "run_dir": tmp_path / "r", "cache": False}
        return prune2deploy.prune_to_budget(net, X, **common, **more)

    return begin


@pytest.fixture
def weights_beside(monkeypatch):
    """Have every export put the weights into a file of their own, as for models above 2 GB."""

    def gather(file):
        place = {"location": f"{file.name}.data", "size_threshold": 64}
        onnx.save_model(onnx.load(str(file)), str(file), save_as_external_data=True, **place)

    monkeypatch.setattr(export, "_gather_weights", gather)


def runs_like(path, module):
    ort = pytest.importorskip("onnxruntime")
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: X.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(found, module(X).numpy(), rtol=1e-4, atol=1e-5)


def test_weights_that_lie_beside_an_onnx_file_come_along(weights_beside, net, run, tmp_path):
    result = run(speedup=1.5)
    assert result.met and not (tmp_path / "r/builds").exists()
    manifest = read_manifest(tmp_path / "r")
    folder = (tmp_path / "r").rename(tmp_path / "moved")
    files = {"baseline": net, "model": result.module, "engine": result.module}
    for name, module in files.items():
        runs_like(folder / f"{name}.onnx", module)
    listed = {entry["path"]: entry["bytes"] for entry in manifest["artefacts"]}
    for row, name in (("baseline", "baseline"), ("final", "model")):
        assert listed[f"{name}.onnx.data"] > 1000
        whole = listed[f"{name}.onnx"] + listed[f"{name}.onnx.data"]
        assert manifest[row]["bytes"] == pytest.approx(whole, rel=0.01)  # names in it changed


class Kill(BaseException):
    """What ends the process."""


def end(*_, **__):
    raise Kill


def test_a_second_session_that_ends_half_way_leaves_no_verdict_beside_its_files(
    run, tmp_path, monkeypatch
):
    few = run(speedup=2.0, max_builds=1)
    assert few.verdict == "missed" and (tmp_path / "r/manifest.json").exists()

    with monkeypatch.context() as patch:
        patch.setattr(summary.write, "write", end)
        with pytest.raises(Kill):
            run(speedup=2.0, max_builds=8, resume=True)
    assert (tmp_path / "r/plan.json").read_text() != few.plan.to_json() + "\n"
    assert not (tmp_path / "r/manifest.json").exists()
    more = run(speedup=2.0, max_builds=8, resume=True)
    assert read_manifest(tmp_path / "r")["verdict"] == more.verdict


def test_a_program_of_an_earlier_session_does_not_outlive_it(run, tmp_path, monkeypatch):
    run(speedup=2.0, max_builds=1)
    assert (tmp_path / "r/model.pt2").exists()

    def refuse(*_):
        raise ExportError("it cannot be expressed")

    monkeypatch.setattr(program, "save", refuse)
    more = run(speedup=2.0, max_builds=8, resume=True)
    assert any("model.pt2 is missing" in note for note in more.report.notes)
    assert not (tmp_path / "r/model.pt2").exists()


@pytest.fixture
def full_disk():
    """Let no file grow beyond 100 kB; the system refuses more as it does on a full disk."""

    @contextlib.contextmanager
    def limit():
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


def test_a_disk_that_fills_up_while_torch_writes_is_told_as_that(tmp_path, full_disk):
    module, x = nn.Linear(200, 200), (torch.randn(1, 200),)
    with RunDir(tmp_path, {}) as held, full_disk():
        with pytest.raises(ConfigError, match=r"weights\.pt: the disk is full"):
            candidate.save_weights(held, module, "weights.pt")
        with (
            pytest.raises(ConfigError, match=r"model\.pt2: the disk is full"),
            held.place("model.pt2") as path,
        ):
            program.save(module, x, path)
    assert {p.name for p in tmp_path.iterdir()} == {"run.json", ".lock"}


def test_a_disk_that_fills_up_anywhere_in_a_run_is_told_with_its_folder(run, tmp_path, full_disk):
    told = rf"^{tmp_path / 'one'}: the disk is full"
    with pytest.raises(ConfigError, match=told), RunDir(tmp_path / "one", {}) as held, full_disk():
        held.journal.write("step", "x" * 200_000)
    with pytest.raises(ConfigError, match=rf"{tmp_path}/r\S*: the disk is full"), full_disk():
        run(speedup=1.5)


def test_what_a_kill_leaves_half_written_is_removed_by_the_next_session(tmp_path, monkeypatch):
    with RunDir(tmp_path / "r", {}) as held:
        held.journal.write("step", 1)
        before = sorted(held.path.iterdir())
    source = tmp_path / "net.onnx"
    source.write_bytes(b"whole")
    none = np.zeros((0, 6), dtype=np.int64)
    taken = samples.Samples(none, none, none, none, none, {})

    def half(_, part):
        part.write_bytes(b"who")
        raise Kill

    works = (
        lambda: samples.save(taken, tmp_path / "r/raw.npz"),
        lambda: onnx_file.place_file(source, tmp_path / "r"),
    )
    for work in works:
        with monkeypatch.context() as patch:
            patch.setattr(np, "savez_compressed", end)
            patch.setattr(shutil, "copyfile", half)
            for owner, name in ((shutil, "rmtree"), (Path, "unlink")):
                patch.setattr(owner, name, lambda *_, **__: None)  # nothing runs after a kill
            with pytest.raises(Kill):
                work()
    assert len(list((tmp_path / "r").iterdir())) == len(before) + 2
    with RunDir(tmp_path / "r", {}, resume=True) as held:
        assert sorted(held.path.iterdir()) == before


def test_a_comparison_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "compare.html").write_text("an earlier one")
    monkeypatch.setattr(write, "comparable", lambda paths: [])
    monkeypatch.setattr(os, "fsync", end)
    arguments = SimpleNamespace(runs=[Path("a"), Path("b")], out=tmp_path)
    with pytest.raises(Kill):
        commands.report(arguments, silent)
    assert (tmp_path / "compare.html").read_text() == "an earlier one"


def test_rendering_a_run_again_vouches_for_what_it_writes_alone(run, tmp_path):
    run(speedup=1.5)
    folder = tmp_path / "r"
    (folder / "model.onnx").write_bytes(b"corrupt")
    (folder / "report.html").unlink()
    before = read_manifest(folder)
    report = json.loads((folder / "report.json").read_text())
    (folder / "report.json").write_text(json.dumps({**report, "model": "another name"}))
    commands.report(SimpleNamespace(runs=[folder], out=None), silent)
    after = read_manifest(folder)
    old, new = ({entry["path"]: entry for entry in one["artefacts"]} for one in (before, after))
    assert {**before, "artefacts": 0} == {**after, "artefacts": 0} and list(old) == list(new)
    found = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in new}
    wrong = [name for name, entry in new.items() if entry["sha256"] != found[name]]
    assert wrong == ["model.onnx"] and new["model.onnx"] == old["model.onnx"]
    assert new["report.html"] != old["report.html"]
