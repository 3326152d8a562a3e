"""The loop converges on a runtime whose latency is a known formula, and never works twice."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn
from torch.nn import functional

import prune2deploy
from prune2deploy import measure
from prune2deploy.backends.null import NullBackend
from prune2deploy.calibration import from_dataset
from prune2deploy.config import Budget
from prune2deploy.errors import ConfigError, ExportError, ParityError
from prune2deploy.journal import Journal
from prune2deploy.measure import Comparison, LatencyStats
from prune2deploy.plan.plan import Plan
from prune2deploy.recover import FinetuneOptions, Training
from prune2deploy.recover.distance import apart, outputs
from prune2deploy.rundir import read_manifest
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.job import Attempt, aim, best, judge
from prune2deploy.timing import OperatorTiming

from .formula import formula_profile

ROOT = Path(__file__).parent.parent


class Net(nn.Module):
    """A stem, eight blocks with shortcuts and a head: ten axes of 4 to 12 widths each."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 64, 3, padding=1)
        self.norm = nn.BatchNorm2d(64)
        inner = (32, 40, 48, 56, 64, 72, 80, 96)
        self.down = nn.ModuleList(nn.Conv2d(64, n, 3, padding=1) for n in inner)
        self.up = nn.ModuleList(nn.Conv2d(n, 64, 3, padding=1) for n in inner)
        self.wide = nn.Conv2d(64, 96, 1)
        self.last = nn.Linear(96, 10)

    def forward(self, x):
        x = torch.relu(self.norm(self.first(x)))
        for down, up in zip(self.down, self.up, strict=True):
            x = x + torch.relu(up(torch.relu(down(x))))
        return self.last(torch.relu(self.wide(x)).mean((2, 3)))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(1, 3, 8, 8)


@pytest.fixture
def target(tmp_path):
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile(fixed_ns=2000.0))
    return path


class Deciding(Net):
    """Goes another way for dark inputs."""

    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else -super().forward(x)


def test_the_report_says_what_the_file_holds_of_the_example(target, tmp_path):
    found = run(
        (Deciding().eval(), torch.rand(1, 3, 8, 8)), target, speedup=1.2, run_dir=tmp_path / "r"
    )
    notes = [note for note in found.report.notes if "values that depend on the input" in note]
    assert len(notes) == 1 and "test_loop.py:" in notes[0]


class Masked(Net):
    """Takes two inputs."""

    def forward(self, picture, mask):
        return super().forward(picture * mask)


@pytest.mark.parametrize(
    ("given", "names", "result"),
    [
        ({}, ["picture", "mask"], ["output"]),
        ({"input_names": ("a", "b"), "output_names": "scores"}, ["a", "b"], ["scores"]),
    ],
)
def test_inputs_and_outputs_are_named_in_the_file(target, tmp_path, given, names, result):
    net = Masked().eval(), (torch.randn(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    done = run(net, target, speedup=1.2, run_dir=tmp_path / "r", **given)
    graph = onnx.load(str(done.run_dir / "model.onnx")).graph
    assert [one.name for one in graph.input] == names
    assert [one.name for one in graph.output] == result
    with pytest.raises(ConfigError, match="names"):
        run(net, target, speedup=1.2, run_dir=tmp_path / "r", resume=True, input_names=("c", "d"))


@pytest.mark.parametrize(
    "names", [{"input_names": ("a", "a")}, {"input_names": ("a", "b"), "output_names": "a"}]
)
def test_a_name_that_is_given_twice_is_an_error(target, tmp_path, names):
    net = Masked().eval(), (torch.randn(1, 3, 8, 8), torch.ones(1, 1, 8, 8))
    with pytest.raises(ExportError, match="found the name 'a' more than once"):
        run(net, target, speedup=1.2, run_dir=tmp_path / "r", **names)


def test_too_few_names_are_an_error(net, target, tmp_path):
    with pytest.raises(ExportError, match="2 input names for 1 input"):
        run(net, target, speedup=1.2, run_dir=tmp_path / "r", input_names=("a", "b"))


def run(net, target, **more):
    model, example = net
    return prune2deploy.prune_to_budget(model, example, target=target, **more)


@pytest.mark.parametrize("speedup", [1.3, 2.0, 4.0])
def test_the_budget_is_met_and_filled_in_few_builds(net, target, tmp_path, speedup):
    result = run(net, target, speedup=speedup, run_dir=tmp_path / "r")
    manifest = read_manifest(result.run_dir)
    assert result.met and manifest["met"]
    assert 0.97 <= manifest["final"]["p50_ms"] / manifest["budget_ms"] <= 1
    assert manifest["final"]["ci95_ms"][1] <= manifest["budget_ms"]
    assert manifest["builds"] <= 6
    graph = prune2deploy.trace(*net)
    assert result.plan.counts
    assert all(count % 8 == 0 for count in result.plan.counts.values())
    assert sum(p.numel() for p in result.module.parameters()) == graph.params(result.plan.counts)
    assert manifest["final"]["params"] == graph.params(result.plan.counts)
    assert manifest["baseline"]["macs"] == graph.macs()
    assert result.module(net[1]).shape == (1, 10)
    limits = result.report.limits
    assert limits.gap is not None and 0 <= limits.gap < 0.03
    assert 0 <= limits.memory_share < 0.1  # the formula counts multiply-accumulates and calls


def test_a_runtime_that_tells_no_operators_apart_is_learnt_from_whole_builds(
    net, target, tmp_path, monkeypatch
):
    """No build is spent on a probe, which only a profile could be learnt from."""
    monkeypatch.setattr(NullBackend, "profile", lambda *_: ())
    result = run(net, target, speedup=2.0, run_dir=tmp_path / "r")
    assert result.met and result.report.builds <= 6
    assert 0.9 <= result.report.final.p50_ms / result.report.budget_ms <= 1
    steps = json.loads((result.run_dir / "report.json").read_text())["steps"]
    assert {line["step"] for line in steps} == {"correction"}


def test_the_measured_latency_is_the_formula(net, target, tmp_path):
    """Counted by hand from the widths: nothing predicted is reported as measured."""
    result = run(net, target, speedup=2.0, run_dir=tmp_path / "r")
    ns = 0.0
    for module in result.module.modules():
        if isinstance(module, nn.Conv2d):
            area = module.kernel_size[0] * module.kernel_size[1]
            ns += 0.01 * 64 * area * up(module.in_channels) * up(module.out_channels)
        elif isinstance(module, nn.Linear):
            ns += 0.01 * up(module.in_features) * up(module.out_features)
    layers = json.loads((result.run_dir / "report.json").read_text())["layers"]
    profiled = [line["after_ms"] for line in layers if line["after_ms"] is not None]
    assert result.measurement.candidate.p50_ms == pytest.approx(sum(profiled), rel=1e-4)
    assert sum(profiled) == pytest.approx((ns + 2000 * len(profiled)) / 1e6, rel=1e-4)


def test_operators_whose_names_move_are_told_side_by_side(net, target, tmp_path, monkeypatch):
    real = NullBackend.profile

    def numbered(self, engine, *rest):
        """Names as of a runtime that numbers operators, one of which pruned models have more."""
        pruned = "baseline" not in str(engine.path)
        found = [
            replace(timing, name=f"{timing.kind}_{place + 10 * pruned}")
            for place, timing in enumerate(real(self, engine, *rest))
        ]
        return (*found, *[OperatorTiming("reorder", "Reorder", (), (), 500.0)] * pruned)

    monkeypatch.setattr(NullBackend, "profile", numbered)
    layers = run(net, target, speedup=2.0, run_dir=tmp_path / "r").report.layers
    assert [x.name for x in layers if x.before_ms is None] == ["reorder"]
    assert all(x.after_ms <= x.before_ms for x in layers[:-1])
    contractions = [x for x in layers if x.kind in ("Conv", "Gemm")]
    assert sum(x.after_ms < 0.9 * x.before_ms for x in contractions) > len(contractions) / 2
    assert layers[-1].after_ms == 0.0005


def up(channels):
    return -(-channels // 8) * 8


@pytest.mark.parametrize("seed", [0, 1])
def test_it_converges_under_noise(net, tmp_path, seed):
    path = tmp_path / "noisy.toml"
    path.write_text(formula_profile(fixed_ns=2000.0, noise=0.05))
    result = run(net, path, speedup=1.7, run_dir=tmp_path / "r", seed=seed)
    assert result.met and result.report.builds <= 9
    seen, budget = result.measurement, result.report.budget_ms
    assert seen.ratio_ci95[1] <= 1 / 1.7 < seen.ratio_ci95[1] / 0.97
    assert result.report.bound_ms == pytest.approx(seen.reference.p50_ms * seen.ratio_ci95[1])
    deadline = run(net, path, budget_ms=budget, run_dir=tmp_path / "ms", seed=seed)
    assert deadline.met and deadline.report.builds <= 9
    assert 0.97 * budget <= deadline.measurement.candidate.ci95_ms[1] <= budget


def test_a_budget_in_milliseconds_and_a_percentile(net, target, tmp_path):
    whole = run(net, target, speedup=1.01, run_dir=tmp_path / "a").report.baseline.p50_ms
    for percentile in (50, 95):
        folder = tmp_path / str(percentile)
        result = run(net, target, budget_ms=whole / 2, percentile=percentile, run_dir=folder)
        assert result.met
        assert result.report.budget_ms == whole / 2
        assert 0.97 <= result.report.final.p50_ms / (whole / 2) <= 1


def test_a_model_that_meets_the_budget_is_left_alone(net, target, tmp_path):
    result = run(net, target, budget_ms=1000.0, run_dir=tmp_path / "r")
    assert result.met and result.plan.counts == {} and result.report.builds == 0
    assert "nothing was pruned" in " ".join(result.report.notes)
    assert (result.run_dir / "model.onnx").exists()
    assert read_manifest(result.run_dir)["fixed_share"] is None  # no model was fitted that says it
    assert "baseline's profiled time" not in (result.run_dir / "report.html").read_text()


def test_out_of_reach_reports_a_floor_that_is_true(net, target, tmp_path):
    result = run(net, target, budget_ms=0.0001, run_dir=tmp_path / "r")
    assert result.verdict == "unreachable" and not result.met
    manifest = read_manifest(result.run_dir)
    assert manifest["met"] is False
    assert manifest["floor_ms"] == manifest["final"]["p50_ms"]
    assert 0 < manifest["fixed_share"] < 1
    assert set(result.plan.counts.values()) == {8}  # nothing smaller is on the grid
    assert (result.run_dir / "model.onnx").exists() and (result.run_dir / "engine.onnx").exists()
    assert "unreachable" in result.report.verdict and "cannot touch" in result.report.verdict


def test_what_misses_is_fitted_to_the_data_and_not_trained(net, target, tmp_path):
    torch.manual_seed(0)
    batches = [((3 + torch.randn(8, 3, 8, 8),), None) for _ in range(4)]
    fresh, trained = (3 + torch.randn(32, 3, 8, 8),), []
    common = {"budget_ms": 0.0001, "finetune": trained.append}
    plain = run(net, target, run_dir=tmp_path / "a", **common)
    fitted = run(net, target, batches=batches, run_dir=tmp_path / "b", **common)
    wanted = outputs(net[0], fresh)
    far, near = (apart(outputs(done.module, fresh), wanted) for done in (plain, fitted))
    assert near < 0.7 * far and not trained
    for done in (plain, fitted):
        assert done.verdict == "unreachable"
        assert "nothing was trained, since the budget is missed" in done.report.notes
    assert fitted.report.steps[-1].step == "final" != plain.report.steps[-1].step


def test_a_missed_run_goes_on_with_more_builds_and_is_trained_then(net, target, tmp_path):
    trained = []
    common = {"speedup": 2.0, "finetune": trained.append, "run_dir": tmp_path / "r"}
    few = run(net, target, max_builds=2, **common)
    assert few.verdict == "missed" and not trained
    assert any("all 2 builds are used" in note for note in few.report.notes)
    more = run(net, target, max_builds=8, resume=True, **common)
    assert more.met and len(trained) == 1
    assert not any("builds are used" in note for note in more.report.notes)
    assert more.report.builds <= 8


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"speedup": "2"}, "speedup: found '2', expected a finite number above 0"),
        ({"speedup": 2.0, "finetune": 3}, "finetune: found a int, expected a function"),
    ],
)
def test_values_of_other_types_are_refused_before_anything_is_built(
    net, target, tmp_path, wrong, told
):
    with pytest.raises(ConfigError, match=told):
        run(net, target, run_dir=tmp_path / "r", **wrong)
    assert not (tmp_path / "r").exists()


def test_what_cannot_be_trained_is_told_before_anything_is_built(net, target, tmp_path):
    samples = from_dataset([(torch.randn(3, 8, 8), n % 3) for n in range(8)], net[1])
    other = nn.Sequential(net[0], nn.Unflatten(1, (2, 5)))
    training = Training(other, samples, FinetuneOptions(epochs=1, device="cpu"))
    with pytest.raises(
        ConfigError, match=r"model returns \(8, 2, 5\).* training function of your own"
    ):
        run((other, net[1]), target, speedup=2.0, finetune=training, run_dir=tmp_path / "r")
    assert not (tmp_path / "r/builds").exists()


def test_one_build_is_too_few_for_a_search_and_a_final_model(net, target, tmp_path):
    with pytest.raises(ConfigError, match=r"max_builds 1: .* expected at least 2"):
        run(net, target, speedup=2.0, max_builds=1, finetune=print, run_dir=tmp_path / "r")
    few = run(net, target, speedup=2.0, max_builds=2, finetune=print, run_dir=tmp_path / "r")
    assert len(few.measurements) >= 1 and few.report.builds <= 2


def test_builds_are_limited(net, target, tmp_path):
    result = run(net, target, speedup=2.0, max_builds=1, run_dir=tmp_path / "r")
    assert result.report.builds == 1
    assert len(result.measurements) == 1


class Stop(KeyboardInterrupt):
    """What Ctrl-C raises."""


def counted(monkeypatch):
    """Count the expensive calls."""
    calls = Counter()

    def count(owner, name):
        real = getattr(owner, name)

        def wrapper(*args, **kwargs):
            value = real(*args, **kwargs)
            calls[name] += 1
            return value

        monkeypatch.setattr(owner, name, wrapper)

    for name in ("compare", "single", "profile"):
        count(measure, name)
    count(NullBackend, "build")
    return calls


@pytest.mark.parametrize("step", [1, 8, 22, 29])
def test_ctrl_c_anywhere_then_resume_does_nothing_twice(net, target, tmp_path, monkeypatch, step):
    calls = counted(monkeypatch)
    whole = run(net, target, speedup=2.0, run_dir=tmp_path / "whole")
    wanted = dict(calls)
    calls.clear()
    seen = []

    def interrupt(where):
        seen.append(where)
        if len(seen) == step:
            raise Stop

    with pytest.raises(Stop):
        run(net, target, speedup=2.0, run_dir=tmp_path / "r", progress=interrupt)
    assert not (tmp_path / "r/manifest.json").exists()
    resumed = run(net, target, speedup=2.0, run_dir=tmp_path / "r", resume=True)
    assert {k: v for k, v in calls.items() if k != "build"} == {
        k: v for k, v in wanted.items() if k != "build"
    }
    assert calls["build"] - wanted["build"] in (0, 1)  # what was interrupted is built again
    assert resumed.plan == whole.plan
    assert resumed.measurement.ratio == whole.measurement.ratio
    calls.clear()
    again = run(net, target, speedup=2.0, run_dir=tmp_path / "r", resume=True)
    assert not calls and again.plan == whole.plan


KILLED = """
import os, signal, torch
from tests import test_loop as loop_tests
torch.manual_seed(0)
net = loop_tests.Net().eval(), torch.randn(1, 3, 8, 8)
seen = []
def die(step):
    seen.append(step)
    if len(seen) == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
loop_tests.run(net, {target!r}, speedup=2.0, run_dir={folder!r}, progress=die)
"""


@pytest.mark.parametrize("step", [12, 31])
def test_kill_9_then_resume_does_nothing_twice(net, target, tmp_path, step):
    folder = tmp_path / "r"
    code = KILLED.format(step=step, target=str(target), folder=str(folder))
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    before = Journal(folder / "journal.jsonl").keys
    assert before and not (folder / "manifest.json").exists()
    result = run(net, target, speedup=2.0, run_dir=folder, resume=True)
    assert result.met
    lines = [
        json.loads(line)["key"] for line in (folder / "journal.jsonl").read_text().splitlines()
    ]
    assert len(lines) == len(set(lines))
    assert tuple(lines[: len(before)]) == before
    assert not list(folder.rglob(".part*"))


def test_progress_never_goes_back_and_knows_the_builds_of_earlier_sessions(net, target, tmp_path):
    batches = [((3 + torch.randn(8, 3, 8, 8),), None) for _ in range(4)]
    common = {"speedup": 2.0, "batches": batches, "run_dir": tmp_path / "r"}
    before, after = [], []

    def stop(step):
        before.append(step)
        if step.stage == "profiling" and step.number == 4:
            raise Stop

    with pytest.raises(Stop):
        run(net, target, max_builds=7, progress=stop, **common)
    run(net, target, max_builds=2, resume=True, progress=after.append, **common)
    numbers = [step.number for step in (*before, *after)]
    assert numbers == sorted(numbers) and max(numbers) <= 7
    assert {step.total for step in before} == {7} == {step.total for step in after}
    assert {step.stage.split()[0] for step in before} >= {"comparing", "measuring", "planning"}
    assert after[0].number == 4 and after[0].remaining_s is None


def test_remaining_time_is_that_of_the_builds_of_this_session():
    heard = []
    shop = Workshop(*[None] * 6, heard.append, 8, (), before=5, started=time.monotonic() - 30)
    shop.say("profiling", 4)
    shop.say("pruning", 6)
    replace(shop, before=0).say("pruning", 1)
    assert [step.remaining_s for step in heard] == [
        None, pytest.approx(60, rel=0.1), pytest.approx(210, rel=0.1)
    ]  # fmt: skip


def test_another_model_cannot_go_on_with_the_run(net, target, tmp_path):
    run(net, target, speedup=2.0, run_dir=tmp_path / "r")
    torch.manual_seed(1)
    with pytest.raises(ConfigError, match="another run"):
        run((Net().eval(), net[1]), target, speedup=2.0, run_dir=tmp_path / "r", resume=True)


class Twin(Net):
    """The same layers under another forward pass."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_run_goes_on_only_with_the_same_content(net, target, tmp_path):
    model, x = net
    data = [((torch.randn(8, 3, 8, 8),), None)]
    common = {"speedup": 2.0, "run_dir": tmp_path / "r", "max_builds": 2}
    run(net, target, batches=data, **common)
    twin = Twin().eval()
    twin.load_state_dict(model.state_dict())
    with pytest.raises(ConfigError, match=r"another run \(content\.code"):
        run((twin, x), target, batches=data, resume=True, **common)
    with pytest.raises(ConfigError, match=r"content\.inputs: 'float32\[1, 3, 8, 8\]' there"):
        run((model, x.repeat(2, 1, 1, 1)), target, batches=data, resume=True, **common)
    with pytest.raises(ConfigError, match=r"content\.data: 'list of 1 batches' there, '' here"):
        run(net, target, resume=True, **common)
    with pytest.raises(ConfigError, match=r"finetune: False there, True here"):
        run(net, target, batches=data, finetune=lambda module: None, resume=True, **common)
    run(net, target, batches=data, resume=True, **common)


def test_resume_without_a_folder_finds_the_run(net, target, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slow = run(net, target, speedup=1.2, max_builds=1)
    torch.manual_seed(3)
    other = run((Net().eval(), net[1]), target, speedup=1.2, max_builds=1)
    assert [r.run_dir.name for r in (slow, other)] == ["Net-formula-1.2x", "Net-formula-1.2x-2"]
    again = run(net, target, speedup=1.2, max_builds=1, resume=True)
    assert again.run_dir == slow.run_dir and again.measurement == slow.measurement


def test_a_misspelt_setting_is_refused(net, target, tmp_path):
    with pytest.raises(ConfigError, match=r"'max_build'; did you mean max_builds"):
        run(net, target, speedup=2.0, max_build=2, run_dir=tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("data", "told"),
    [([], "found no batch"), (iter([((torch.zeros(1, 3, 8, 8),), None)]), "read once")],
)
def test_data_without_a_batch_is_refused_before_anything_is_built(
    net, target, tmp_path, data, told
):
    with pytest.raises(ConfigError, match=told):
        run(net, target, speedup=2.0, batches=data, run_dir=tmp_path / "r")
    assert not (tmp_path / "r/builds").exists()


class Single(Net):
    """A model that takes a batch of one only."""

    def forward(self, x):
        return super().forward(x.reshape(1, 3, 8, 8))


def test_a_model_of_a_fixed_batch_is_run_on_no_data(net, target, tmp_path):
    data = from_dataset(torch.randn(8, 3, 8, 8), (net[1],), batch=4)
    single = Single().eval(), net[1]
    with pytest.raises(
        ConfigError, match=r"fails on inputs of shapes \[\(2, 3, 8, 8\)\], .*purposes"
    ):
        run(single, target, speedup=2.0, batches=data, run_dir=tmp_path / "a")
    other = [((torch.randn(8, 3, 8),), None)]
    with pytest.raises(ConfigError, match=r"of shapes \[\(2, 3, 8\)\], .* correct the data"):
        run(net, target, speedup=2.0, batches=other, run_dir=tmp_path / "b")
    elsewhere = replace(data, purposes=("int8", "parity"))
    assert run(single, target, speedup=2.0, batches=elsewhere, run_dir=tmp_path / "c").met


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (
            lambda module: Net(),
            r"down\.0\.weight has shape \(32, 64, 3, 3\) in torch.float32 afterwards",
        ),
        (lambda module: nn.Sequential(module), r"0\.down\.0\.bias .* expected None as in"),
        (lambda module: {"loss": 0.1}, "returned a dict, expected None"),
    ],
)
def test_training_must_keep_the_widths(net, target, tmp_path, train, told):
    with pytest.raises(ConfigError, match=told):
        run(net, target, speedup=2.0, finetune=train, run_dir=tmp_path / "r")
    assert not (tmp_path / "r/weights.pt").exists()


def test_the_users_training_is_called_once_and_shipped(net, target, tmp_path):
    called = []

    def train(module):
        called.append(module)
        with torch.no_grad():
            module.last.bias.fill_(7.0)

    before = {k: v.clone() for k, v in net[0].state_dict().items()}
    result = run(net, target, speedup=2.0, finetune=train, run_dir=tmp_path / "r")
    assert len(called) == 1 and result.met
    assert torch.equal(result.module.last.bias, torch.full((10,), 7.0))
    assert all(torch.equal(before[k], v) for k, v in net[0].state_dict().items())
    state = torch.load(result.run_dir / "weights.pt", weights_only=True)
    assert torch.equal(state["last.bias"], torch.full((10,), 7.0))
    program = torch.export.load(result.run_dir / "model.pt2").module()
    torch.testing.assert_close(program(net[1]), result.module(net[1]))
    again = run(net, target, speedup=2.0, finetune=train, run_dir=tmp_path / "r", resume=True)
    assert len(called) == 1
    torch.testing.assert_close(again.module(net[1]), result.module(net[1]))


def test_data_brings_the_pruned_model_nearer_to_the_unpruned_one(net, target, tmp_path):
    batches = [((3 + torch.randn(8, 3, 8, 8),), None) for _ in range(4)]
    fresh = (3 + torch.randn(32, 3, 8, 8),)
    plain = run(net, target, speedup=2.0, run_dir=tmp_path / "a")
    better = run(net, target, speedup=2.0, batches=batches, run_dir=tmp_path / "b")
    wanted = outputs(net[0], fresh)
    far, near = (apart(outputs(done.module, fresh), wanted) for done in (plain, better))
    assert near < 0.5 * far
    assert [line.step for line in plain.report.steps].count("final") == 0
    assert [line.step for line in better.report.steps].count("final") == 1
    assert "data-free" in " ".join(plain.report.notes)
    told = " ".join(better.report.notes)
    assert "fitted to what the unpruned model computes on 28 samples" in told
    assert "measured on 32 samples" in told
    assert "compared by their loss on 32 samples" in told
    assert "compared" not in " ".join(plain.report.notes)


def fickle(module):
    """Make a module give other outputs whenever it is called."""
    inner = module.forward
    module.forward = lambda x: functional.dropout(inner(x), 0.5, training=True)


def test_a_model_that_disagrees_with_its_engine_is_never_shipped(net, target, tmp_path):
    with pytest.raises(ParityError):
        run(net, target, speedup=2.0, finetune=fickle, run_dir=tmp_path / "r")
    assert not (tmp_path / "r/model.onnx").exists()
    assert not (tmp_path / "r/manifest.json").exists()


def seen(candidate, reference, half=0.01):
    ratio = candidate / reference
    return Comparison(
        LatencyStats(candidate, candidate * 1.1, candidate * 1.2,
                     (candidate * (1 - half), candidate * (1 + half)), 100),
        LatencyStats(reference, reference * 1.1, reference * 1.2, (reference, reference), 100),
        ratio, (ratio * (1 - half), ratio * (1 + half)), "cpu", candidate, None, None, "precise",
        (), {}, {},
    )  # fmt: skip


def test_judging_uses_the_interval_and_the_session():
    half = Budget(speedup=2)
    assert judge(seen(9.8, 20), half)[-1] == "met"
    assert judge(seen(9.95, 20), half)[-1] == "uncertain"
    assert judge(seen(10.2, 20), half)[-1] == "missed"
    slower = judge(seen(10.2, 30), half)  # a slower session
    assert slower == (15.0, 10.2, pytest.approx(10.2 * 1.01), "met")
    assert judge(seen(9.8, 20), Budget(latency_ms=9.9))[-1] == "met"
    tail = seen(9.8, 20)
    assert judge(tail, Budget(latency_ms=9.9, percentile=99)) == (
        9.9, pytest.approx(11.76), pytest.approx(11.76), "missed",
    )  # fmt: skip
    assert judge(tail, Budget(latency_ms=12, percentile=99))[-1] == "met"


def test_a_tail_that_a_busy_host_may_have_made_is_no_miss():
    wanted = Budget(latency_ms=9.9, percentile=99)
    busy = replace(seen(9.8, 20), flags=("noisy host",))
    assert judge(busy, wanted)[-1] == "uncertain"
    assert judge(replace(busy, flags=("opened once",)), wanted)[-1] == "missed"
    slow = replace(seen(10.2, 20), flags=("noisy host",))
    assert judge(slow, wanted)[-1] == "missed"  # its median is over the budget


def test_milliseconds_are_judged_by_how_well_the_session_knows_them():
    sure = seen(9.8, 20)
    vague = replace(sure, candidate=replace(sure.candidate, ci95_ms=(9.0, 10.7)))
    assert judge(vague, Budget(latency_ms=10))[-1] == "uncertain"
    assert judge(vague, Budget(latency_ms=10.7))[-1] == "met"
    assert judge(vague, Budget(speedup=2))[-1] == "met"  # a ratio is known better


def test_a_percentile_without_samples_enough_is_never_met():
    few = seen(9.8, 20)
    few = replace(few, candidate=replace(few.candidate, unbounded=(99,)))
    assert judge(few, Budget(latency_ms=1000, percentile=99))[-1] == "uncertain"
    assert judge(few, Budget(latency_ms=1000, percentile=95))[-1] == "met"


def attempt(number, value_ms, verdict, **kept):
    """An attempt at a budget of 10 ms that keeps so many channels of each axis."""
    plan = Plan({axis: tuple(range(count)) for axis, count in kept.items()})
    built = Built(number, "correction", plan, 0, 0, 0, "", "", 0.0)
    budget = Budget(speedup=2)
    return Attempt(built, (), seen(9, 20), 9.0, budget, 10.0, value_ms, value_ms, verdict)


def test_the_best_is_the_worthiest_that_meets_else_the_fastest():
    fast, full = attempt(1, 9.0, "met", a=8, b=4), attempt(2, 9.8, "met", a=4, b=8)
    slow, slower = attempt(3, 10.5, "missed", a=16, b=8), attempt(4, 11.0, "missed", a=17, b=8)
    assert best([slower, slow]) is slow

    def worth(plan):
        return {8: 1.0, 4: 0.98, 16: 9.0}[plan.counts["a"]]

    assert best([slow, fast, full, slower], worth) is fast
    assert best([slow, fast, full, slower], worth, near=0.01) is fast
    assert best([slow, fast, full, slower], worth, near=0.03) is full


def test_a_plan_that_another_one_is_wider_than_is_not_the_best():
    narrow, wide = attempt(1, 9.8, "met", a=4, b=8), attempt(2, 9.2, "met", b=8)
    assert best([narrow, wide], near=1.0) is wide
    assert wide.built.plan.wider(narrow.built.plan)
    assert not narrow.built.plan.wider(wide.built.plan)
    assert not wide.built.plan.wider(wide.built.plan)
    other = attempt(3, 9.0, "met", a=8, b=4).built.plan
    assert not other.wider(narrow.built.plan) and not narrow.built.plan.wider(other)
    assert Plan({"a": (0,)}).wider(Plan({"a": (0,)}, removed=("block",)))


def test_the_aim_leaves_room_for_the_interval():
    assert aim(100, 0.01) * 1.01 < 100
    assert aim(100, 0.5) > 89  # a hopeless interval does not shrink the model without end


def test_a_budget_is_filled_by_the_upper_bound():
    base = Attempt(None, (), seen(9, 20), 9.0, Budget(latency_ms=10), 10.0, 9.2, 9.75, "met")
    assert base.filled
    assert not replace(base, bound_ms=9.6).filled
    assert not replace(base, verdict="uncertain").filled
