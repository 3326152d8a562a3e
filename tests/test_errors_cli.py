"""Bad input gets a clear error, the right exit code, and loses nothing."""

import errno
import json
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from prune2deploy import cli, commands
from prune2deploy.report.content import SweepReport, to_json

from .formula import formula_profile

ROOT = Path(__file__).parent.parent
NETS = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.last = nn.Linear(width, 10)

    def forward(self, x):
        return self.last(torch.relu(self.first(x)).mean((2, 3)))

class Failing(Net):
    def forward(self, x):
        raise ValueError("the cat ate it")

class Silent(Net):
    def forward(self, x):
        super().forward(x)

class Bare(nn.Module):
    def forward(self, x):
        return x + 1

X = torch.ones(1, 3, 8, 8)
small = lambda: (Net(), X)
wider = lambda: (Net(48), X)
failing = lambda: (Failing(), X)
silent = lambda: (Silent(), X)
bare = lambda: (Bare(), X)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("errors")
    (folder / "formula.toml").write_text(formula_profile())
    (folder / "nets.py").write_text(NETS)
    return folder


@pytest.fixture
def fails(place, monkeypatch, capsys):
    """Run the command line; assert its exit code, its words, and that no trace is shown."""
    monkeypatch.chdir(place)

    def check(arguments, code, *said):
        found = cli.run([str(a) for a in arguments])
        told = capsys.readouterr()
        assert found == code, told.err
        assert told.out == ""
        assert "Traceback" not in told.err
        for words in said:
            assert words.lower() in told.err.lower()
        return told.err

    return check


def run(model="nets.py:small", *more):
    return ["run", "--model", model, "--target", "./formula.toml", "--speedup", "1.5", *more]


BUDGETS = {
    "neither": ([], "neither"),
    "both": (["--latency-ms", "5", "--speedup", "2"], "both"),
    "zero": (["--latency-ms", "0"], "above 0"),
    "negative": (["--latency-ms=-3"], "above 0"),
    "nan": (["--latency-ms", "nan"], "finite"),
    "infinite": (["--speedup", "inf"], "finite"),
    "no gain": (["--speedup", "1"], "above 1"),
    "no number": (["--speedup", "fast"], "found 'fast', expected a number"),
}


@pytest.mark.parametrize("case", BUDGETS)
def test_budgets(fails, case):
    arguments, said = BUDGETS[case]
    fails(["--target", "ort", *arguments], 2, said)


USAGE = {
    "command": (["runn"], "did you mean run?"),
    "option": (
        ["run", "--target", "ort", "--speedup", "2", "--fast"],
        "found --fast, which is no option",
    ),
    "nearly an option": ([*run(), "--latency", "2"], "did you mean --latency-ms?"),
    "before what is missing": (["--versio"], "found --versio, which is no option"),
    "no target": (["run", "--speedup", "2"], "expected also --target"),
    "no value": (["run", "--target"], "--target: found nothing after it"),
    "half a sample": ([*run(), "--batch", "1.5"], "--batch: found '1.5', expected a whole number"),
    "precision": (
        [*run(), "--precision", "FP16"],
        "found 'FP16'; did you mean fp16? expected one of fp16, fp32, int8",
    ),
    "model without its option": (["run", "resnet50", "--target", "ort"], "found 'resnet50'"),
    "folder of an empty variable": ([*run(), "--out", ""], "--out: found an empty path"),
    "file of an empty variable": (["measure", "", "--target", "ort"], "found an empty path"),
    "less than an operation": ([*run(), "--max-macs", "0.5"], "--max-macs: found 0.5"),
    "huge batch": ([*run(), "--batch", "99999999999999999999"], "smaller --batch"),
    "huge picture": ([*run(), "--input-size", "99999"], "smaller --batch or --input-size"),
    "batch": ([*run(), "--batch", "0"], "--batch"),
    "size": ([*run(), "--input-size", "big"], "HxW"),
    "builds": ([*run(), "--max-builds", "0"], "--max-builds"),
    "percentile": ([*run(), "--percentile", "42"], "50, 95 or 99"),
    "finetune": ([*run(), "--finetune", "2"], "--data"),
    "int8": ([*run(), "--precision", "int8"], "--data"),
    "ratios": (["sweep", "--target", "ort", "--ratios", "0:2:1"], "--ratios"),
    "tiny step": (["sweep", "--target", "ort", "--ratios", "0:0.9:1e-320"], "at most 1000"),
    "small step": (["sweep", "--target", "ort", "--ratios", "0:0.9:0.0005"], "at most 1000"),
    "mixed ratios": (["sweep", "--target", "ort", "--ratios", "0:0.9,0.1"], "START:STOP:STEP"),
    "huge seed": ([*run(), "--seed", "99999999999999999999999"], "at most 9223372036854775807"),
    "short option": (["inspect", "--jso"], "--jso"),
}


@pytest.mark.parametrize("case", USAGE)
def test_usage(fails, case):
    arguments, said = USAGE[case]
    fails(arguments, 2, said)


PROBE = ["measure", "--target", "ort", "--probe-alignment"]
FILE = ["measure", "net.onnx", "--target", "ort"]
IDLE = {
    "batch of a probe": ([*PROBE, "--batch", "2"], "--batch: found it beside --probe-alignment"),
    "other file of a probe": ([*PROBE, "--against", "a.onnx"], "--against"),
    "size of a probe": ([*PROBE, "--input-size", "32"], "--input-size"),
    "folder of a measurement": ([*FILE, "--out", "x"], "--out: found it without --probe-alignment"),
    "cache of a measurement": ([*FILE, "--no-cache"], "--no-cache"),
    "folder of a single report": (["report", "run", "--out", "x"], "--out: found it beside a sing"),
    "precision of axes": (["inspect", "--precision", "fp16"], "which is no option"),
}


@pytest.mark.parametrize("case", IDLE)
def test_options_that_would_do_nothing(fails, case):
    arguments, said = IDLE[case]
    fails(arguments, 2, said)


def test_precisions_that_a_backend_lacks(fails, make_onnx):
    asked = ["--target", "torch", "--precision", "int8"]
    told = "--precision: found 'int8', expected one of fp32, fp16 for backend 'torch'"
    fails(["run", "--model", "nets.py:small", "--speedup", "2", *asked], 2, told)
    fails(["build", make_onnx(), *asked], 2, told)


def test_data_that_would_do_nothing(place, fails, make_onnx):
    build = ["build", make_onnx(), "--target", "ort", "--out", place / "built"]
    fails([*build, "--precision", "fp32", "--data", "random"], 2, "--data random: found", "fp32")
    assert not [*(place / "built").iterdir()]


def test_sizes_that_no_dimension_can_take(fails, make_onnx):
    fails([*FILE, "--batch", "0"], 2, "--batch: found 0")
    file = ["measure", make_onnx(), "--target", "ort"]
    fails([*file, "--batch", "8"], 2, "--batch 8 cannot apply", "x (1, 3, 12, 12)")
    fails([*file, "--input-size", "8x9"], 2, "--input-size 8x9 cannot apply")


NAMES = {
    "model": (run("resnet51"), "resnet50"),
    "empty model": (run(""), "--model"),
    "timm model": (run("timm:resnet51_nothing"), "resnet"),
    "factory": (run("nets.py:smal"), "small"),
    "target": (["run", "--target", "orrt", "--speedup", "2"], "ort"),
    "criterion": ([*run(), "--importance", "l3"], "l2"),
    "recipe": ([*run(), "--data", "nowhere.toml"], "nowhere.toml"),
}


@pytest.mark.parametrize("case", NAMES)
def test_unknown_names_offer_the_nearest(fails, case):
    arguments, said = NAMES[case]
    fails(arguments, 2, said)


GOOD = formula_profile()
PROFILES = {
    "syntax": ("backend = [", "not valid toml"),
    "type": (GOOD.replace("threads = 1", 'threads = "one"'), "threads"),
    "key": ("thread = 1\n" + GOOD, "thread"),
    "range": (GOOD.replace("channel_multiple = 8", "channel_multiple = 0"), "channel_multiple"),
    "backend": (GOOD.replace('"null"', '"nul"'), "backend"),
    "bytes": (b"\xff\xfe\x00", "utf-8"),
}


@pytest.mark.parametrize("case", PROFILES)
def test_profiles_name_file_and_key(place, fails, case):
    text, said = PROFILES[case]
    path = place / f"bad-{case}.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    arguments = ["run", "--model", "nets.py:small", "--target", path, "--speedup", "2"]
    fails(arguments, 2, said, path.name)


class Bomb:
    def __reduce__(self):
        return (os.system, ("touch exploded",))


def _weights(place, case):
    import torch

    path = place / f"{case}.pt"
    if case == "truncated":
        torch.save({"first.weight": torch.zeros(32, 3, 3, 3)}, path)
        path.write_bytes(path.read_bytes()[:100])
    elif case == "no state dict":
        torch.save([1, 2, 3], path)
    elif case == "other model":
        torch.save({"other.weight": torch.zeros(3)}, path)
    elif case == "other widths":
        first = {"first.weight": torch.zeros(48, 3, 3, 3), "first.bias": torch.zeros(48)}
        last = {"last.weight": torch.zeros(10, 48), "last.bias": torch.zeros(10)}
        torch.save(first | last, path)
    elif case == "pickle":
        path.write_bytes(pickle.dumps(Bomb()))
    elif case == "pickle in torch":
        torch.save({"first.weight": Bomb()}, path)
    return path


WEIGHTS = "missing, truncated, no state dict, other model, other widths, pickle, pickle in torch"


@pytest.mark.parametrize("case", WEIGHTS.split(", "))
def test_weights(place, fails, case):
    path = _weights(place, case)
    fails([*run(), "--weights", path], 2, path.name)
    assert not (place / "exploded").exists()


MODELS = {
    "failing": "the cat ate it",
    "silent": "no tensor",
    "bare": "prune",
}


@pytest.mark.parametrize("name", MODELS)
def test_models_that_cannot_be_pruned(fails, name):
    fails(run(f"nets.py:{name}"), 2, MODELS[name])


def unreadable(path):
    """Make a file that exists and whose reading fails, for every user."""
    path.unlink(missing_ok=True)
    path.symlink_to("/proc/self/mem")
    return path


needs_proc = pytest.mark.skipif(
    not Path("/proc/self/mem").exists(), reason="needs a file that nobody can read"
)
FILES = {
    "a folder": lambda path: path.mkdir(),
    "an empty file": lambda path: path.write_bytes(b""),
    "an unreadable file": unreadable,
}


def input_options(name, path):
    """The ways a file reaches a command, by the suffix of its name."""
    weights = [[*run(), "--weights", path]]
    return {
        "model.pt": [run(path), *weights],
        "model.pt2": [run(path)],
        "model.py": [run(f"{path}:net")],
        "weights.pth": weights,
        "weights.safetensors": weights,
        "recipe.toml": [[*run(), "--data", path]],
        "profile.toml": [["run", "--model", "nets.py:small", "--target", path, "--speedup", "2"]],
        "file.onnx": [[c, path, "--target", "ort"] for c in ("measure", "build")],
    }[name]


INPUTS = (
    "model.pt, model.pt2, model.py, weights.pth, weights.safetensors, recipe.toml, profile.toml, "
    "file.onnx"
)


@needs_proc
@pytest.mark.parametrize("made", FILES)
@pytest.mark.parametrize("name", INPUTS.split(", "))
def test_files_that_hold_nothing_to_read(tmp_path, fails, name, made):
    path = tmp_path / name
    FILES[made](path)
    for arguments in input_options(name, path):
        told = fails(arguments, 2)
        assert path.name in told or str(path.resolve()) in told
        assert len(told.splitlines()) == 1, told


@needs_proc
def test_a_picture_that_cannot_be_read_is_named(tmp_path, fails):
    (tmp_path / "pictures").mkdir()
    path = unreadable(tmp_path / "pictures/one.png")
    (tmp_path / "mine.toml").write_text('reader = "images"\npath = "pictures"')
    fails([*run(), "--data", tmp_path / "mine.toml"], 2, f"{path}: cannot be read", "replace it")


def test_a_file_that_may_not_be_read_is_not_told_as_one_to_write(monkeypatch, capsys):
    def denied(arguments, progress):
        raise PermissionError(errno.EACCES, "Permission denied", "secret.bin")

    monkeypatch.setitem(commands.TABLE, "targets", denied)
    assert cli.run(["targets"]) == 2
    told = capsys.readouterr().err
    assert "secret.bin: cannot be used (Permission denied)" in told and "--out" not in told


@pytest.mark.parametrize("case", ["missing", "text", "truncated"])
@pytest.mark.parametrize("command", ["measure", "build"])
def test_files_that_are_no_onnx(place, fails, case, command):
    path = place / f"{case}.onnx"
    if case != "missing":
        path.write_bytes({"text": b"hello", "truncated": b"\x08\x08\x12"}[case])
    fails([command, path, "--target", "ort"], 2, path.name, "onnx")


def test_places_that_cannot_be_written_or_hold_something_else(place, fails):
    (place / "file").write_text("")
    fails([*run(), "--out", "file"], 2, "file", "--out")
    fails([*run(), "--out", "/proc/none"], 2, "/proc/none", "--out")
    (place / "mine").mkdir(exist_ok=True)
    (place / "mine/thesis.tex").write_text("precious")
    fails([*run(), "--out", "mine"], 2, "thesis.tex")
    (place / "other").mkdir(exist_ok=True)
    (place / "other/run.json").write_text(json.dumps({"target": "trt"}))
    fails([*run(), "--out", "other", "--resume"], 2, "another run")
    assert (place / "mine/thesis.tex").read_text() == "precious"


def test_runs_that_are_none(place, fails):
    fails(["report", "nowhere"], 2, "nowhere", "report.json")
    (place / "broken").mkdir(exist_ok=True)
    (place / "broken/report.json").write_text("{")
    fails(["report", "broken"], 2, "not a report")
    report = SweepReport("net", "ort", 8, 1.0, ())
    (place / "broken/report.json").write_text(to_json(report))
    (place / "broken/run.json").write_text("{")
    fails(["report", "broken"], 2, "run.json: not of a run")


def test_a_target_that_is_not_here_says_what_is_missing_and_what_works(place, fails):
    text = (ROOT / "targets/ort.toml").read_text().replace("CPUExecution", "OpenVINOExecution")
    (place / "absent.toml").write_text(text)
    told = fails(["run", "--target", "./absent.toml", "--speedup", "2"], 3, "OpenVINOExecution")
    assert "pip install" in told and "targets that work here: " in told
    assert "ort" in told.split("targets that work here: ")[1]
    assert not list(place.glob("runs/*absent*"))


NOT_A_NUMBER = """
import torch
from torch import nn

def net():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))
    x = torch.randn(1, 3, 8, 8)
    model(x)
    model[0].weight.data.fill_(float("nan"))
    return model, (x,)

def frozen():
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), (torch.randn(1, 3, 2, 2),)
"""


@pytest.mark.parametrize(
    ("factory", "code", "told"),
    [("net", 5, "NaN"), ("frozen", 2, "nothing to prune")],
)
def test_models_that_cannot_be_judged_are_refused_at_once(tmp_path, capsys, factory, code, told):
    (tmp_path / "odd.py").write_text(NOT_A_NUMBER)
    out = tmp_path / "run"
    call = ["run", "--model", f"{tmp_path}/odd.py:{factory}", "--target", "ort", "--speedup", "2"]
    assert cli.run([*call, "--out", str(out)]) == code
    assert told in capsys.readouterr().err
    assert not list(out.glob("raw/*"))


def test_a_disk_that_fills_up_inside_a_library_is_told_as_such(monkeypatch, capsys):
    def full(arguments, progress):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setitem(commands.TABLE, "targets", full)
    assert cli.run(["targets"]) == 2
    assert "the disk is full" in capsys.readouterr().err


def test_a_reader_that_goes_away_is_no_bug():
    script = "import sys; from prune2deploy.cli import run; sys.exit(run(['targets']))"
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE) as child:
        child.stdout.close()
        assert child.wait() == 128 + signal.SIGPIPE


FULL = Path("/dev/full")


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
@pytest.mark.parametrize("more", [[], ["--json"]])
def test_an_answer_that_cannot_be_written_is_no_bug(more):
    done = shell(f"targets {' '.join(more)} > {FULL}")
    assert done.returncode == 2
    assert "the disk is full" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "--json >&-"])
def test_closed_streams_are_no_bug(closed):
    assert shell(f"targets {closed}").returncode == 0


def test_what_an_encoding_lacks_is_escaped(place):
    (place / "ünï.py").write_text(NETS)
    done = shell("inspect --model ünï.py:small", place, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("\\xfcn\\xef.py:small")


def shell(line, cwd=ROOT, **more):
    """Run a command line of this program in a shell."""
    return subprocess.run(
        ["/bin/sh", "-c", f"{sys.executable} -m prune2deploy {line}"],
        capture_output=True, text=True, cwd=cwd, timeout=240,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more},
    )  # fmt: skip
