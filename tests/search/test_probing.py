"""The staircase of a device is found, kept, shown, and used by later runs."""

import dataclasses
import json

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import cli, target
from prune2deploy.backends import registry
from prune2deploy.measure import native_channel_multiple
from prune2deploy.plan.alignment import FAMILIES, ROUNDS
from prune2deploy.progress import silent
from prune2deploy.search import probing, recall
from prune2deploy.search.recall import Timings

from ..formula import formula_profile


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv(recall.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def profile(tmp_path, step):
    path = tmp_path / f"formula{step}.toml"
    path.write_text(formula_profile(channel_multiple=None, step=step, fixed_ns=10.0))
    return path


def timings_of(path):
    one = target.load(path)
    backend = registry.for_target(one)
    return one, backend, Timings(recall.folder(), recall.context(one, backend))


@pytest.mark.parametrize("step", [8, 16, 32])
def test_the_step_of_the_formula_is_found_kept_and_used(tmp_path, place, step):
    one, backend, timings = timings_of(profile(tmp_path, step))
    heard = []
    assert probing.multiple(one, backend, timings, heard.append) == (step, "probed on this device")
    assert len(heard) == 4 * 12 * ROUNDS
    found = probing.probe(one, backend, timings, heard.append)
    assert {s.family for s in found} == set(FAMILIES)
    assert all(s.step == step for s in found if s.family != "depthwise")
    assert probing.multiple(one, backend, timings, heard.append)[0] == step
    assert len(heard) == 4 * 12 * ROUNDS  # from the cache


def test_a_step_that_is_not_sure_is_told(tmp_path, place, monkeypatch):
    one, backend, timings = timings_of(profile(tmp_path, 16))
    taken = iter(range(100_000))
    real = probing.least_ns

    def disturbed(session):
        turn, width = divmod(next(taken) % (12 * ROUNDS), 12)
        return real(session) * (1.5 if turn and width % 2 else 1.0)

    monkeypatch.setattr(probing, "least_ns", disturbed)
    step, source = probing.multiple(one, backend, timings, silent)
    assert step == 16 and source == "probed on this device, which was too disturbed to be sure"
    monkeypatch.setattr(probing, "least_ns", real)
    assert probing.multiple(one, backend, timings, silent) == (16, "probed on this device")


def test_the_profile_overrides_and_without_a_cache_the_cpu_decides(tmp_path, place):
    path = profile(tmp_path, 32)
    one, backend, timings = timings_of(path)
    named = dataclasses.replace(one, channel_multiple=4)
    given = (4, "given by the target profile")
    assert probing.multiple(named, backend, timings, silent) == given
    off = Timings(None, recall.context(one, backend))
    detected = (native_channel_multiple(), "detected on this machine")
    assert probing.multiple(one, backend, off, silent) == detected
    assert not place.exists()


def test_what_is_known_is_not_timed_again(tmp_path, place):
    one, backend, timings = timings_of(profile(tmp_path, 8))
    heard = []
    first = probing.probe(one, backend, timings, heard.append)
    count = len(heard)
    assert count == 4 * 12 * ROUNDS
    assert probing.probe(one, backend, timings, heard.append) == first
    assert len(heard) == count


def test_the_command_prints_a_table_and_writes_a_picture(tmp_path, place, capsys):
    path = profile(tmp_path, 16)
    out = tmp_path / "out"
    arguments = ["measure", "--probe-alignment", "--target", str(path), "--out", str(out)]
    assert cli.run(arguments) == 0
    shown = capsys.readouterr().out
    assert "channel multiple 16" in shown and "conv1x1" in shown
    written = json.loads((out / "alignment-formula16.json").read_text())
    assert written["channel_multiple"] == 16
    assert written["families"]["matmul"]["step"] == 16
    assert (out / "alignment-formula16.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_or_the_probe_is_needed_but_not_both(tmp_path, capsys):
    path = str(profile(tmp_path, 16))
    assert cli.run(["measure", "--target", path]) == 2
    assert cli.run(["measure", "x.onnx", "--probe-alignment", "--target", path]) == 2
    assert "--probe-alignment" in capsys.readouterr().err


def test_widths_of_a_runtime_without_onnx_files_are_not_probed(tmp_path, place, capsys):
    arguments = ["measure", "--probe-alignment", "--target", "torch", "--out", str(tmp_path / "o")]
    assert cli.run(arguments) == 2
    assert "found target 'torch', whose runtime takes no ONNX file" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_a_narrow_model_gets_a_finer_step(tmp_path, place):
    """Sixteen channels are one block of 32, and still worth pruning."""
    torch.manual_seed(0)
    stem, head = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 4, 3)
    model = nn.Sequential(stem, nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), head).eval()
    path = profile(tmp_path, 8)
    path.write_text("channel_multiple = 32\n" + path.read_text())
    result = prune2deploy.prune_to_budget(
        model, torch.randn(1, 3, 12, 12), target=path, speedup=1.2, run_dir=tmp_path / "r"
    )
    limits = result.report.limits
    assert result.met and set(result.plan.counts.values()) <= {8}
    assert limits.channel_multiple == 8
    assert limits.multiple_source == "32, given by the target profile, leaves too little to prune"


def test_a_runtime_of_programs_is_not_probed_with_onnx_files(place):
    where = target.load("torch")
    backend = registry.for_target(where)
    timings = recall.timings(where, backend)
    assert timings.kept and where.channel_multiple is None
    found = probing.multiple(where, backend, timings, silent)
    assert found == (native_channel_multiple(), "detected on this machine")
