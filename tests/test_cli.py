"""The command line: arguments, exit codes, one JSON document, quiet progress."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prune2deploy import __main__, arguments, cli, commands, console
from prune2deploy.config import (
    Budget,
    ModelOptions,
    RunOptions,
    SweepOptions,
    digest,
    parse_ratios,
    parse_size,
)
from prune2deploy.errors import ConfigError
from prune2deploy.progress import Step
from prune2deploy.search import candidate

from .formula import formula_profile

ROOT = Path(__file__).parent.parent
NET = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 32, 3, padding=1)
        self.second = nn.Conv2d(32, 48, 3, padding=1)
        self.last = nn.Linear(48, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(x.mean((2, 3)))

def small():
    return Net(), torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
"""


@pytest.fixture
def place(tmp_path):
    """A folder with a target by formula and a small model, made the working folder."""
    (tmp_path / "formula.toml").write_text(formula_profile())
    (tmp_path / "net.py").write_text(NET)
    before = Path.cwd()
    os.chdir(tmp_path)
    yield tmp_path
    os.chdir(before)


def command(*arguments, cwd=ROOT, timeout=240):
    return subprocess.run(
        [sys.executable, "-m", "prune2deploy", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=timeout,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


SMALL = ("--model", "net.py:small", "--target", "./formula.toml")


def test_run_writes_a_whole_run_directory_and_one_json_document(place):
    done = command(*SMALL, "--speedup", "1.5", "--out", "out", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["met"] is True and manifest["verdict"] == "met"
    assert manifest["judged_ms"] <= manifest["bound_ms"] <= manifest["budget_ms"]
    assert manifest["judged_ms"] == manifest["final"]["p50_ms"] and manifest["percentile"] == 50
    assert manifest["speedup"] >= 1.5
    there = {p.relative_to(place / "out").as_posix() for p in (place / "out").rglob("*")}
    assert {
        "manifest.json", "model.onnx", "baseline.onnx", "engine.onnx", "model.pt2", "weights.pt",
        "plan.json", "journal.jsonl", "report.html", "report.json", "report.csv", "axes.png",
        "layers.png", "target.toml", "raw/baseline.npz",
    } <= there  # fmt: skip
    listed = {a["path"] for a in manifest["artefacts"]}
    files = {p for p in there if (place / "out" / p).is_file()} - {"manifest.json", ".lock"}
    assert listed == files
    on_disk = json.loads((place / "out/manifest.json").read_text())
    assert {k: v for k, v in manifest.items() if k != "run_dir"} == on_disk


def test_a_finished_run_is_shown_compared_and_rendered_again(place):
    for name, factor in (("a", "1.3"), ("b", "1.6")):
        done = command(*SMALL, "--speedup", factor, "--out", name, cwd=place)
        assert done.returncode == 0, done.stderr
        assert "measured p50 (ms)" in done.stdout and "builds" in done.stdout
        told = done.stderr.splitlines()  # a log, where standard error is no terminal
        assert told[0] == "prune2deploy: baseline: pruning"
        builds = [line.split()[2] for line in told if line.startswith("prune2deploy: build ")]
        once = list(dict.fromkeys(builds))  # the best is gone back to at the end
        assert once == [str(number) for number in range(1, len(once) + 1)]
        assert len(builds) <= len(once) + 1
    (place / "a/report.html").unlink()
    again = command("report", "a", cwd=place)
    assert again.returncode == 0 and "measured p50" in again.stdout
    assert (place / "a/report.html").exists()
    both = command("report", "a", "b", "--out", "page", "--json", cwd=place)
    assert set(json.loads(both.stdout)) == {"a", "b"}
    assert (place / "page/compare.html").exists()
    same = command(*SMALL, "--speedup", "1.3", "--out", "a", "--resume", "--json", cwd=place)
    assert same.returncode == 0 and json.loads(same.stdout)["met"]


def test_sweep_inspect_build_and_measure(place):
    done = command("sweep", *SMALL, "--ratios", "0:0.5:0.25", "--out", "s", "--json", cwd=place)
    assert done.returncode == 0, done.stderr
    points = json.loads(done.stdout)["points"]
    assert [p["ratio"] for p in points] == [0.0, 0.25, 0.5]
    assert points[0]["speedup"] == pytest.approx(1)
    assert points[0]["p50_ms"] > points[1]["p50_ms"] > points[2]["p50_ms"]
    for name in ("report.csv", "report.json", "report.html", "latency.png", "baseline.onnx"):
        assert (place / "s" / name).stat().st_size > 100
    axes = json.loads(command("inspect", *SMALL[:2], "--json", cwd=place).stdout)["axes"]
    assert {a["name"]: a["size"] for a in axes if a["frozen"] is None} == {
        "first": 32,
        "second": 48,
    }
    held = command("inspect", *SMALL[:2], "--keep", "second", "--json", cwd=place)
    axes = json.loads(held.stdout)["axes"]
    assert [a["name"] for a in axes if a["frozen"] == "kept as asked"] == ["second"]
    onnx = "s/baseline.onnx"
    built = command("build", onnx, *SMALL[2:], "--out", "engine", "--json", cwd=place)
    assert Path(json.loads(built.stdout)["engine"]).exists()
    alone = command("measure", onnx, *SMALL[2:], "--json", cwd=place)
    assert json.loads(alone.stdout)["latency"]["p50_ms"] == pytest.approx(points[0]["p50_ms"])
    pair = command("measure", onnx, *SMALL[2:], "--against", onnx, cwd=place)
    assert "ratio 1.0000" in pair.stdout


def test_a_sweep_tells_every_note_leaves_no_working_files_and_goes_on(place, monkeypatch, capfd):
    (place / "formula.toml").write_text(formula_profile(channel_multiple=None))
    monkeypatch.setenv("PRUNE2DEPLOY_CACHE", str(place / "net.py"))  # no folder
    real = candidate.build

    def noted(shop, number, *rest):
        return replace(real(shop, number, *rest), notes=("of all", f"of {number}"))

    monkeypatch.setattr(candidate, "build", noted)
    seen = []
    for again in ((), ("--resume",)):
        given = ("sweep", *SMALL, "--ratios", "0:0.5:0.25", "--out", "s", "--json", *again)
        assert cli.run(given) == 0, capfd.readouterr().err
        seen.append(json.loads(capfd.readouterr().out))
        assert not (place / "s/builds").exists() and (place / "s/baseline.onnx").exists()
    assert seen[0]["points"] == seen[1]["points"]
    assert "no timings of earlier runs were used" in seen[0]["notes"][0]
    assert seen[0]["notes"][1:] == ["of all", "of 0", "of 2", "of 3"] == seen[1]["notes"]


def test_a_file_with_free_dimensions_is_measured_at_the_shape_that_is_asked_for(place):
    import onnx

    onnx.save(_free(("n", 3, "h", "w")), "free.onnx")
    onnx.save(_free((4, 3, 16, 8)), "fixed.onnx")
    line = ("measure", "free.onnx", *SMALL[2:])
    wanted = ("--batch", "4", "--input-size", "16x8")
    found = [
        json.loads(command(*arguments, "--json", cwd=place).stdout)["latency"]["p50_ms"]
        for arguments in (
            (*line, *wanted),
            ("measure", "fixed.onnx", *SMALL[2:]),
            (*line, "--input-size", "16x8"),
        )
    ]
    assert found[0] == pytest.approx(found[1])
    assert found[2] < 0.5 * found[0], "a batch of 1 unless told"
    pair = command(*line, "--against", "fixed.onnx", *wanted, cwd=place)
    assert "ratio 1.0000" in pair.stdout
    told = command(*line, cwd=place)
    assert told.returncode == 2 and "(1, 3, h, w)" in told.stderr
    assert "give --input-size HxW" in told.stderr


def _free(dims):
    """A model file of one convolution with these dimensions of its input."""
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight = numpy_helper.from_array(np.ones((512, 3, 3, 3), np.float32), "w")
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in (("x", dims), ("y", (dims[0], 512, "oh", "ow")))
    ]
    node = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    graph = helper.make_graph([node], "net", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def test_an_exported_program_goes_the_way_of_any_model(place, capfd):
    def said(*arguments):
        assert cli.run([*map(str, arguments), "--json"]) == 0, capfd.readouterr().err
        return json.loads(capfd.readouterr().out)

    said("run", *SMALL, "--speedup", "1.3", "--out", "a")
    axes = said("inspect", "--model", "a/model.pt2")["axes"]
    widths = {axis["name"]: axis["size"] for axis in axes if axis["frozen"] is None}
    assert widths.keys() == {"first", "second"} and sum(widths.values()) < 32 + 48
    again = ("--model", "a/model.pt2", *SMALL[2:], "--speedup", "1.2", "--out", "b")
    assert said("run", *again)["met"]
    again = ("--model", "b/model.pt2", *SMALL[2:], "--ratios", "0,0.5", "--out", "s")
    points = said("sweep", *again)["points"]
    assert points[0]["p50_ms"] > points[1]["p50_ms"]


def test_accuracy_of_labelled_data_is_in_the_manifest(place, capfd):
    dice, labels = np.random.default_rng(0), np.arange(160) % 10
    np.savez("data.npz", x=dice.normal(size=(160, 3, 8, 8)).astype("float32"), y=labels)
    (place / "data.toml").write_text(
        'reader = "arrays"\npath = "data.npz"\n[options]\ninputs = "x"\nlabels = "y"\n'
    )
    more = ("--data", "data.toml", "--finetune", "1", "--out", "r", "--json")
    seen = []
    for again in ((), ("--resume",)):
        assert cli.run(["run", *SMALL, "--speedup", "2", *more, *again]) == 0, capfd.readouterr()
        seen.append(json.loads(capfd.readouterr().out))
    found = seen[0]["accuracy"]
    assert found["samples"] == 160 and 0 <= found["baseline"] <= 1 and 0 <= found["final"] <= 1
    told = "fitted to what the unpruned model computes on 140 samples"
    assert any(told in note for note in seen[0]["notes"])
    trained = next(note for note in seen[0]["notes"] if note.startswith("trained for 1 epochs"))
    assert "steps" in trained and "samples that were trained on" in trained
    assert seen[1]["accuracy"] == found and seen[1]["notes"] == seen[0]["notes"]


def test_targets_are_listed_with_the_line_that_fixes_what_is_missing(capfd):
    assert cli.run(["targets", "--json"]) == 0
    rows = {row["name"]: row for row in json.loads(capfd.readouterr().out)}
    assert rows["ort"]["usable"]
    assert all(row["usable"] or (row["reason"] and row["fix"]) for row in rows.values())
    assert cli.run(["targets"]) == 0
    shown = capfd.readouterr().out
    assert all(name in shown for name in rows)


def test_arguments_without_a_command_are_those_of_run():
    found = cli.parse(["--target", "ort", "--latency-ms", "20"])
    assert (found.command, found.model, found.latency_ms) == ("run", "resnet50", 20.0)
    assert cli.parse(["run", "--target", "ort"]).max_builds == 8


def test_the_help_of_every_command_shows_its_use(capsys):
    from prune2deploy.importance import NAMES

    shown = {}
    for name in arguments.COMMANDS:
        assert cli.run([name, "--help"]) == 0
        shown[name] = capsys.readouterr().out
        assert f"examples:\n  prune2deploy {name}" in shown[name]
    assert all(name in shown["run"] for name in NAMES)
    for command, (_, _, examples) in arguments.COMMANDS.items():
        for example in examples:
            words = shlex.split(example.replace("\\\n", " "))
            assert cli.parse([command, *words]).command == command


def test_random_weights_are_told(place, monkeypatch, capsys):
    def stop(*arguments, **options):
        raise KeyboardInterrupt

    read = commands._load
    for random in (True, False):
        with monkeypatch.context() as patch:
            patch.setattr(commands, "_load", lambda o, r=random: replace(read(o), random=r))
            patch.setattr("prune2deploy.search.payoff.settle", stop)
            assert cli.run([*map(str, SMALL), "--speedup", "1.3"]) == 130
        assert ("note: weights are random" in capsys.readouterr().err) == random


def test_memory_that_runs_out_is_no_bug(monkeypatch, capsys):
    def greedy(arguments, progress):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried ...")

    monkeypatch.setattr(commands, "TABLE", {"targets": greedy})
    assert cli.run(["targets"]) == 2
    told = capsys.readouterr().err
    assert "memory ran out" in told and "smaller --batch" in told and "Traceback" not in told


def test_json_errors_are_one_document_too():
    done = command("run", "--target", "ort", "--speedup", "0", "--json")
    assert done.returncode == 2
    assert json.loads(done.stdout)["exit_code"] == 2
    assert "--speedup" in done.stderr


def test_a_bug_is_told_as_a_bug(monkeypatch, capsys):
    def broken(arguments, progress):
        raise KeyError("x")

    monkeypatch.setattr(commands, "TABLE", {"targets": broken})
    assert cli.run(["targets"]) == 1
    assert "a bug of prune2deploy" in capsys.readouterr().err


def test_ctrl_c_is_no_bug_and_offers_nothing_that_the_command_has_not(monkeypatch, capsys):
    def stopped(arguments, progress):
        raise KeyboardInterrupt

    monkeypatch.setattr(commands, "TABLE", {"targets": stopped})
    assert cli.run(["targets"]) == 130
    assert capsys.readouterr().err == "prune2deploy: interrupted\n"


def test_a_folder_with_a_space_is_quoted_in_the_line_that_goes_on(place, monkeypatch, capsys):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("prune2deploy.search.payoff.settle", stop)
    assert cli.run([*map(str, SMALL), "--speedup", "1.3", "--out", "my run"]) == 130
    assert "--resume --out 'my run'" in capsys.readouterr().err


def test_a_run_that_is_terminated_says_how_to_go_on(place, monkeypatch, capsys):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("prune2deploy.search.payoff.settle", stop)
    monkeypatch.setattr(sys, "argv", ["prune2deploy", *SMALL, "--speedup", "1.3", "--out", "mine"])
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as left:
            __main__.main()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143
    assert "same command and --resume --out mine" in capsys.readouterr().err
    assert not [*(place / "mine").rglob(".part-*")]


def test_resume_finds_the_run_by_its_content_and_names_it(place, monkeypatch, capsys):
    given = [*map(str, SMALL), "--speedup", "1.3"]

    def stop(where):
        raise KeyboardInterrupt

    for number, source in enumerate((NET, NET.replace("48", "64"), NET.replace("48", "56"))):
        (place / "net.py").write_text(source)
        with monkeypatch.context() as patch:
            patch.setattr("prune2deploy.search.payoff.settle", lambda *a, **k: stop(a))
            assert cli.run(given) == 130
        assert "--resume --out runs/" in capsys.readouterr().err
        assert [p.name for p in (place / "runs").iterdir()] == ["net.py-small-formula-1.3x"]
        if number < 2:
            assert cli.run(given) == 0  # the folder of a run that finished nothing is free
            shutil.move(place / "runs/net.py-small-formula-1.3x", place / f"done{number}")
    capsys.readouterr()
    shutil.move(place / "done1", place / "runs/net.py-small-formula-1.3x-2")
    (place / "net.py").write_text(NET.replace("48", "64"))
    assert cli.run([*given, "--resume"]) == 0
    assert "1.3x-2" in capsys.readouterr().out
    (place / "net.py").write_text(NET.replace("torch.relu(self.first(x))", "self.first(x)"))
    assert cli.run([*given, "--resume"]) == 2
    assert "holds another run (content.code" in capsys.readouterr().err


def test_resume_says_where_there_is_nothing_to_go_on_with(place, capsys):
    given = [*map(str, SMALL), "--speedup", "1.3", "--out", "new", "--resume"]
    assert cli.run(given) == 0
    assert "note: new holds no run to go on with; a new one begins" in capsys.readouterr().err
    assert cli.run(given) == 0
    assert "begins" not in capsys.readouterr().err


def test_a_command_that_is_refused_takes_no_folder(place, capsys):
    wrong = [*map(str, SMALL), "--speedup", "1.3", "--out", "r", "--data", "nowhere.toml"]
    assert cli.run(wrong) == 2
    assert not (place / "r").exists()
    assert cli.run(["--model", "net.py:smal", *wrong[2:-2]]) == 2
    assert cli.run([*wrong[:-2], "--importance", "taylor"]) == 2
    assert "importance 'taylor' looks at data and was given none" in capsys.readouterr().err
    assert not (place / "r").exists()


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0:0.95:0.05", tuple(round(0.05 * i, 9) for i in range(20))),
        ("0:0.9:0.1", tuple(round(0.1 * i, 9) for i in range(10))),
        ("0.5", (0.5,)),
        ("0.5,0.25", (0.25, 0.5)),
    ],
)
def test_ratios(text, ratios):
    assert parse_ratios(text) == ratios


NOWHERE = "; a; 0:1:0.1; 0:0.9; 0:0.9:0; 0.9:0:0.1; -0.1,0.5; 0:0.9:nan; 0:0.9:1e-9"


@pytest.mark.parametrize("text", NOWHERE.split("; "))
def test_ratios_that_lead_nowhere(text):
    with pytest.raises(ConfigError, match="--ratios"):
        parse_ratios(text)


def test_sizes():
    assert parse_size("320x640") == (320, 640)
    assert parse_size("96") == (96, 96)
    for bad in ("0", "0x320", "32x", "axb", "-1x3", "3x", "1.5x2"):
        with pytest.raises(ConfigError, match=r"expected HxW"):
            parse_size(bad)


def test_more_builds_do_not_make_another_run_but_other_options_do():
    one = RunOptions(Budget(speedup=2), "ort")
    assert one.identity() == RunOptions(Budget(speedup=2), "ort", max_builds=20).identity()
    for other in (
        RunOptions(Budget(speedup=3), "ort"),
        RunOptions(Budget(speedup=2), "trt"),
        RunOptions(Budget(speedup=2), "ort", ModelOptions("resnet18")),
    ):
        assert digest(one.identity()) != digest(other.identity())
    assert SweepOptions("ort", (0.0,)).identity() != SweepOptions("ort", (0.5,)).identity()


def test_progress_names_stage_build_and_time():
    assert console.describe(Step("building", 0, 9)) == "baseline: building"
    assert console.describe(Step("measuring", 3, 9)) == "build 3 of at most 9: measuring"
    assert console.describe(Step("probing widths", 3, 40, unit="model")) == (
        "model 3 of at most 40: probing widths"
    )
    assert console.remaining(None) == ""
    assert console.remaining(30) == "about 30 s left"
    assert console.remaining(600) == "about 10 min left"


def test_progress_in_a_log_is_a_line_for_each_build():
    lines = []
    progress = console.logging(lines.append)
    progress(Step("building", 0, 9))
    for part in range(1, 4):
        progress(Step("probing widths", part, 40, unit="model"))
    for build in (1, 2):
        for stage in ("pruning", "exporting"):  # further stages are no further lines
            progress(Step(stage, build, 9, remaining_s=100.0))
    assert lines == [
        "baseline: building",
        "model 1 of at most 40: probing widths",
        "build 1 of at most 9: pruning, about 2 min left",
        "build 2 of at most 9: pruning, about 2 min left",
    ]


def test_progress_is_one_line_that_is_drawn_again_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    with console.drawing() as progress:
        progress(Step("measuring", 1, 9, remaining_s=45.0))
    assert "measuring" in capsys.readouterr().err
