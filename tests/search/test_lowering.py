"""Runs below fp32: what is built, measured against fp32, calibrated, scored, and shipped."""

import json
from dataclasses import replace
from pathlib import PurePath
from types import SimpleNamespace

import onnx
import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy import calibration, summary, target
from prune2deploy.backends import onnx_file, registry
from prune2deploy.calibration import first, from_dataset
from prune2deploy.errors import ConfigError, ParityError
from prune2deploy.exporting import keeping, parity, precision
from prune2deploy.exporting.export import to_onnx
from prune2deploy.graph import trace
from prune2deploy.importance import score
from prune2deploy.progress import NOTICE
from prune2deploy.rundir import RunDir, read_manifest
from prune2deploy.search import accuracy, candidate, lowering
from prune2deploy.search.lowering import LoweringOptions, lower, top1
from prune2deploy.search.payoff import Payoff

FORMULA = """
backend = "null"
device = "none"
channel_multiple = 8
threads = 1
precision = "{precision}"
[options]
step = 8
fixed_ns = {fixed}
[measure]
min_seconds = 0.0
max_seconds = 5.0
"""
ORT = """
backend = "ort"
device = "cpu"
channel_multiple = 16
threads = 1
precision = "{precision}"
[measure]
min_seconds = 0.0
max_seconds = 1.0
min_samples = 10
half_width = 0.5
control = false
"""


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.second = nn.Conv2d(width, width, 3, padding=1)
        self.last = nn.Linear(width, 10)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.last(x.mean((2, 3)))


class Samples:
    """Inputs with the class that a network gives them, so that its accuracy is 1."""

    def __init__(self, count, net=None):
        generator = torch.Generator().manual_seed(3)
        self.inputs = torch.randn(count, 3, 8, 8, generator=generator)
        self.labels = None if net is None else net(self.inputs).argmax(1)

    def __len__(self):
        return len(self.inputs)

    def __getitem__(self, i):
        one = self.inputs[i].numpy()
        return one if self.labels is None else (one, int(self.labels[i]))


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval(), torch.randn(1, 3, 8, 8)


@pytest.fixture
def batches(net):
    return from_dataset(Samples(24, net[0]), (net[1],), batch=8)


@pytest.fixture
def profile(tmp_path):
    def write(text=FORMULA, **values):
        path = tmp_path / "profile.toml"
        path.write_text(text.format(**{"precision": "fp32", "fixed": 10.0, **values}))
        return path

    return write


def run(net, target, folder, **more):
    return prune2deploy.prune_to_budget(*net, target=target, speedup=1.5, run_dir=folder, **more)


def kinds(path):
    return {node.op_type for node in onnx.load(str(path)).graph.node}


def inputs(path):
    return {v.type.tensor_type.elem_type for v in onnx.load(str(path)).graph.input}


# --- what is measured is what was asked for -----------------------------------------------------


@pytest.mark.ort
def test_an_int8_run_on_ort_measures_and_ships_quantised_files(net, profile, tmp_path, batches):
    more = {"precision": "int8", "batches": batches, "max_builds": 2}
    result = run(net, profile(ORT), tmp_path / "r", **more)
    facts = read_manifest(result.run_dir)
    for name in ("model.onnx", "baseline.onnx", "engine.onnx"):
        assert "QuantizeLinear" in kinds(result.run_dir / name)
    assert facts["target"]["precision"] == facts["precision"]["chosen"] == "int8"
    borders = [line["border"] for line in facts["parity"]]
    assert borders == ["torch and ONNX", "fp32 ONNX and int8 ONNX", "int8 ONNX and engine"]
    assert all(line["passed"] for line in facts["parity"])
    paid = facts["precision"]["against_fp32"]
    assert paid["precision"] == "int8" and paid["asked"] and paid["ratio"] > 0
    assert any(note.startswith("int8 takes ") for note in facts["notes"])


@pytest.mark.ort
def test_an_fp16_run_on_ort_measures_and_ships_half_precision(net, profile, tmp_path):
    result = prune2deploy.prune_to_budget(
        *net, target=profile(ORT), budget_ms=1000.0, precision="fp16", run_dir=tmp_path / "r"
    )
    for name in ("model.onnx", "baseline.onnx"):
        assert inputs(result.run_dir / name) == {onnx.TensorProto.FLOAT16}
    assert result.module(net[1]).dtype == torch.float32
    told = json.loads((result.run_dir / "report.json").read_text())
    assert [line["border"] for line in told["parity"]][1] == "fp32 ONNX and fp16 ONNX"


@pytest.mark.parametrize("purposes", [calibration.PURPOSES, ("int8", "evaluate")])
def test_ranges_come_from_all_samples_only_for_what_is_compared_or_shipped(
    net, profile, tmp_path, batches, monkeypatch, purposes
):
    seen = []
    real = lowering.lower

    def noting(path, out, options):
        made = real(path, out, options)
        seen.append((options.quick, made.samples))
        return made

    monkeypatch.setattr(lowering, "lower", noting)
    batches = replace(batches, purposes=purposes)
    result = run(net, profile(), tmp_path / "r", precision="int8", batches=batches)
    assert result.met and len(seen) - 1 == result.report.builds <= 8
    assert seen[0] == (False, 24), "the unpruned model"
    assert seen[-1] == (False, 24), "the model that is shipped"
    assert len(seen) > 2
    assert set(seen[1:-1]) == {(True, 8)}, "the search"
    lowered = read_manifest(result.run_dir)["precision"]["lowered"]
    assert lowered["samples"] == 24 and not lowered["quick"]


def test_the_target_says_how_ranges_are_found(net, profile, tmp_path, batches, monkeypatch):
    methods = []
    real = precision.to_int8

    def noting(path, out, data, options):
        methods.append(options.method)
        return real(path, out, data, options)

    monkeypatch.setattr(precision, "to_int8", noting)
    where = profile('int8_ranges = "percentile"\n' + FORMULA)
    run(net, where, tmp_path / "r", precision="int8", batches=batches)
    assert methods[0] == methods[-1] == "percentile", "the unpruned model and what is shipped"
    assert set(methods[1:-1]) == {"minmax"}, "the search, for which only latency matters"


def test_what_the_unpruned_model_keeps_in_fp32_every_other_one_keeps_too(
    net, profile, tmp_path, batches, monkeypatch
):
    wishes = []
    real = precision.to_int8

    def keeping(path, out, data, options):
        wishes.append(options.keep)
        return replace(real(path, out, data, options), kept=("/second/Conv", *options.keep))

    monkeypatch.setattr(precision, "to_int8", keeping)
    run(net, profile(), tmp_path / "r", precision="int8", batches=batches)
    assert wishes[0] == ()
    assert all("/second/Conv" in options for options in wishes[1:])


def test_what_lies_beside_an_engine_is_shipped_with_it(tmp_path):
    with RunDir(tmp_path / "r", {}) as held:
        for name in ("model.engine", "model.engine.json", "model.build.log", "model.other"):
            held.write_text(f"builds/x/{name}", name)
        summary._keep_engine(held, PurePath("builds/x/model.engine"))
        found = {a.path for a in held.artefacts()} - {"run.json", "journal.jsonl"}
    assert found == {"engine.engine", "engine.engine.json", "engine.build.log"}


# --- does it pay? -------------------------------------------------------------------------------


def test_a_precision_of_the_profile_that_is_slower_is_given_up_and_told(
    net, profile, tmp_path, batches
):
    """By this formula every operator costs much, so the pairs of Q and DQ make int8 slower."""
    slow = profile(precision="int8", fixed=50_000.0)
    result = run(net, slow, tmp_path / "r", batches=batches)
    facts = read_manifest(result.run_dir)
    assert facts["precision"]["chosen"] == "fp32"
    assert facts["precision"]["against_fp32"]["ratio"] > 1.5
    assert "QuantizeLinear" not in kinds(result.run_dir / "model.onnx")
    note = next(note for note in facts["notes"] if note.startswith("int8 takes"))
    assert "SLOWER" in note and "precision int8" in note
    ratio = facts["precision"]["against_fp32"]["ratio"]
    assert f"{ratio:.3f}" in note


def test_a_slower_precision_that_was_asked_for_stays_and_is_told(net, profile, tmp_path, batches):
    slow = profile(fixed=50_000.0)
    shop_target = target.load(slow)
    assert shop_target.precision == "fp32"
    model, example = net
    result = prune2deploy.prune_to_budget(
        model, example, target=slow, budget_ms=10.0, precision="int8", batches=batches,
        run_dir=tmp_path / "r",
    )  # fmt: skip
    facts = read_manifest(result.run_dir)
    assert facts["precision"]["chosen"] == "int8"
    assert "QuantizeLinear" in kinds(result.run_dir / "model.onnx")
    assert any("SLOWER" in note and "precision fp32" in note for note in facts["notes"])


def test_the_payoff_is_only_told_as_slower_beyond_doubt():
    doubtful = Payoff("int8", 1.02, (0.98, 1.06), 1.0, 1.0, "int8", asked=False)
    assert not doubtful.slower and "SLOWER" not in doubtful.text()
    assert replace(doubtful, ratio_ci95=(1.01, 1.03)).slower


def test_fp32_is_measured_once_and_nothing_is_said(net, profile, tmp_path):
    result = run(net, profile(), tmp_path / "r")
    facts = read_manifest(result.run_dir)
    assert facts["precision"] == {"chosen": "fp32", "against_fp32": None, "lowered": None}


def test_a_run_in_int8_goes_on_without_measuring_again(net, profile, tmp_path, batches):
    where = profile()
    first = run(net, where, tmp_path / "r", precision="int8", batches=batches)
    lines = (tmp_path / "r/journal.jsonl").read_text().count('"schema"')
    again = run(net, where, tmp_path / "r", precision="int8", batches=batches, resume=True)
    assert again.measurement.candidate.p50_ms == first.measurement.candidate.p50_ms
    after = (tmp_path / "r/journal.jsonl").read_text().count('"schema"')
    assert after - lines == 1, "only the note that a session began"


# --- wrong outputs are not shipped --------------------------------------------------------------


def test_a_model_that_int8_breaks_is_exit_5_and_nothing_is_shipped(
    net, profile, tmp_path, batches, monkeypatch
):
    monkeypatch.setattr(parity, "TOLERANCE", {**parity.TOLERANCE, "int8": 1e-9})
    monkeypatch.setattr(keeping, "ROUNDS", 1)
    with pytest.raises(ParityError, match="fp32 ONNX and int8 ONNX disagree") as raised:
        run(net, profile(), tmp_path / "r", precision="int8", batches=batches)
    assert raised.value.exit_code == 5
    assert not (tmp_path / "r/model.onnx").exists()
    assert not (tmp_path / "r/manifest.json").exists()


def test_int8_without_data_is_refused_before_anything_is_built(net, profile, tmp_path):
    with pytest.raises(ConfigError, match=r"add batches=\.\.\."):
        run(net, profile(), tmp_path / "r", precision="int8")
    assert not (tmp_path / "r/builds").exists()


FIRST = torch.tensor([0])

# --- data ---------------------------------------------------------------------------------------


@pytest.fixture
def small(net, tmp_path):
    return to_onnx(*net[:1], (net[1],), tmp_path / "small.onnx")


def test_accuracy_is_counted_by_hand(net, small, batches):
    labels = torch.cat([labels for _, labels in batches])
    found = net[0](torch.cat([inputs[0] for inputs, _ in batches])).argmax(1)
    assert top1(small, batches) == (float((found == labels).float().mean()), 24)
    wrong = [(inputs, (labels + 1) % 10) for inputs, labels in batches]
    assert top1(small, wrong) == (0.0, 24)
    for other in (lambda _: None, torch.Tensor.double, lambda labels: labels + 10):
        assert top1(small, [(inputs, other(labels)) for inputs, labels in batches]) is None
    every = list(batches)
    every[-1] = (every[-1][0], torch.full_like(every[-1][1], -100).index_fill(0, FIRST, 3))
    scored = 24 - len(every[-1][1]) + 1
    right = float((found[: scored - 1] == labels[: scored - 1]).sum() + (found[scored - 1] == 3))
    assert top1(small, every) == (right / scored, scored)


def test_a_label_of_no_class_behind_the_first_samples_is_told(small, tmp_path, batches):
    every = list(batches)
    every[-1] = (every[-1][0], torch.full_like(every[-1][1], -1))
    with pytest.raises(ConfigError, match="--max-drop: found data without class labels, or with"):
        lower(small, tmp_path / "q.onnx", LoweringOptions("int8", "cpu", every, max_drop=0.1))


def test_samples_that_fill_a_fixed_batch_are_not_scored(net, tmp_path, batches):
    x = torch.randn(7, 3, 8, 8)
    seven = to_onnx(net[0], (x,), tmp_path / "seven.onnx")
    assert top1(seven, batches) == (1.0, 24)
    assert top1(seven, batches.first(3)) == (1.0, 3)
    right = [(inputs, labels) for inputs, labels in batches.first(8)]
    wrong = [(inputs, (labels + 1) % 10) for inputs, labels in batches.first(2)]
    assert top1(seven, [*right, *wrong]) == (0.8, 10)


def test_accuracy_is_part_of_what_is_told(small, tmp_path, batches):
    made = lower(small, tmp_path / "q.onnx", LoweringOptions("int8", "cpu", batches))
    assert made.parity.tolerance == parity.TOLERANCE["int8"]
    assert made.top1_fp32 == 1.0 and made.scored == 24
    assert made.top1 is not None and made.top1 >= 0.8
    assert "top-1" in made.text() and "24 samples" in made.text()


def test_data_without_labels_is_gone_through_once_for_its_ranges(small, tmp_path, batches):
    class Counting:
        read = 0

        def __iter__(self):
            for inputs, _ in batches:
                self.read += 1
                yield inputs, None

    counting = Counting()
    made = lower(small, tmp_path / "q.onnx", LoweringOptions("int8", "cpu", counting))
    assert made.samples == 24 and made.top1 is None
    assert len(batches) <= counting.read < 2 * len(batches)


def test_max_drop_decides_in_place_of_the_outputs_difference(small, tmp_path, batches, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", {**parity.TOLERANCE, "int8": 1e-9})
    monkeypatch.setattr(keeping, "ROUNDS", 1)
    strict = lower(small, tmp_path / "a.onnx", LoweringOptions("int8", "cpu", batches))
    lenient = lower(
        small, tmp_path / "b.onnx", LoweringOptions("int8", "cpu", batches, max_drop=0.3)
    )
    assert not strict.passed and not strict.parity.passed
    assert lenient.passed and lenient.parity.passed
    with pytest.raises(ConfigError, match="--max-drop"):
        unlabelled = [(inputs, None) for inputs, _ in batches]
        lower(small, tmp_path / "c.onnx", LoweringOptions("int8", "cpu", unlabelled, max_drop=0.3))


def test_fp16_is_held_to_max_drop_like_int8(small, tmp_path, batches, monkeypatch):
    monkeypatch.setattr(parity, "TOLERANCE", {**parity.TOLERANCE, "fp16": 1e-9})
    strict = lower(small, tmp_path / "a.onnx", LoweringOptions("fp16", batches=first(batches, 8)))
    lenient = lower(
        small, tmp_path / "b.onnx", LoweringOptions("fp16", batches=batches, max_drop=0.3)
    )
    assert not strict.passed and lenient.passed
    assert lenient.kept == () and lenient.top1 is not None
    lowering.require(lenient, 0.3)
    broken = replace(lenient, passed=False, top1=0.5)
    with pytest.raises(ParityError, match=r"fp16 costs 50.00%.*--max-drop allows 30.00%"):
        lowering.require(broken, 0.3)
    lowering.require(broken, None)
    lowering.require(replace(broken, quick=True), 0.3)


@pytest.mark.parametrize("count", [3, 24])
@pytest.mark.parametrize("wanted", ["fp32", "fp16", "int8"])
def test_a_model_whose_batch_is_above_that_of_the_data(net, profile, tmp_path, count, wanted):
    x = torch.randn(16, 3, 8, 8)
    data = from_dataset(Samples(count, net[0]), (x,), batch=4)
    common = {"target": profile(), "speedup": 1.2, "max_builds": 2, "precision": wanted}
    result = prune2deploy.prune_to_budget(
        net[0], x, batches=data, run_dir=tmp_path / "run", **common
    )
    assert onnx_file.signature(result.run_dir / "model.onnx")[0][0].shape == (16, 3, 8, 8)
    assert result.report.accuracy.samples == count


def test_a_run_that_loses_too_much_accuracy_says_how_much_and_ships_nothing(
    net, profile, tmp_path, batches, monkeypatch
):
    real = lowering.top1
    monkeypatch.setattr(
        lowering,
        "top1",
        lambda path, data, *limit: (
            real(path, data, *limit)[0] - 0.4 * ("Quan" in str(kinds(path))),
            24,
        ),
    )
    monkeypatch.setattr(keeping, "ROUNDS", 1)
    shop = {"precision": "int8", "batches": batches, "max_drop": 0.1}
    with pytest.raises(
        ParityError, match=r"int8 costs 4\d\.\d+% of top-1.*allows 10.00%"
    ) as raised:
        run(net, profile(), tmp_path / "r", **shop)
    assert raised.value.exit_code == 5
    assert not (tmp_path / "r/model.onnx").exists()


def test_labels_of_other_classes_are_refused_before_anything_is_built(net, profile, tmp_path):
    samples = Samples(8, net[0])
    samples.labels = samples.labels + 5
    batches = from_dataset(samples, (net[1],), batch=4)
    with pytest.raises(ConfigError, match=r"Samples: sample \d: found label 1\d, expected 0 to 9"):
        run(net, profile(), tmp_path / "r", batches=batches)
    assert not (tmp_path / "r/builds").exists()


def test_max_drop_means_nothing_in_fp32(net, profile, tmp_path, batches):
    with pytest.raises(ConfigError, match=r"max_drop 0.1: found precision fp32"):
        run(net, profile(), tmp_path / "r", batches=batches, max_drop=0.1)


def test_a_file_for_timing_is_not_searched_but_judged_all_the_same(
    small, tmp_path, batches, monkeypatch
):
    monkeypatch.setattr(parity, "TOLERANCE", {"fp32": 1e-3, "fp16": 1e-9, "int8": 1e-9})
    for wanted in ("fp16", "int8"):
        options = LoweringOptions(wanted, "cpu", batches, quick=True)
        made = lower(small, tmp_path / f"{wanted}.onnx", options)
        assert made.kept == () and not made.passed and not made.parity.passed
        assert made.parity.tolerance == 1e-9


def test_data_says_what_it_is_not_for(net):
    class For:
        example_inputs = (net[1],)
        preprocessing = None

    random = calibration.open_recipe("random", For())
    calibration.require(random, "int8")
    with pytest.raises(ConfigError, match="finetune"):
        calibration.require(random, "finetune")
    calibration.require([1, 2], "finetune")
    assert "RANDOM" in calibration.notices(random)[0]
    assert calibration.notices([1, 2]) == ()


def test_data_is_used_for_its_purposes_alone(net, small, profile, tmp_path, batches):
    other = replace(batches, purposes=("bn",))
    one = [parity.as_sample((net[1],))]
    options = LoweringOptions("fp16", batches=other, samples=one)
    made = lower(small, tmp_path / "half.onnx", options)
    assert made.parity.samples == 1 and made.top1 is None
    shop = SimpleNamespace(batches=other, example_inputs=(net[1],), input_names=("input",))
    assert (candidate._samples(shop, small)[0]["input"] == one[0]["input"]).all()
    assert accuracy.take(shop, None, None) is None
    with pytest.raises(ConfigError, match="not for 'importance'"):
        score("taylor", net[0], trace(*net), other)
    more = {"precision": "int8", "batches": replace(batches, purposes=("int8",))}
    with pytest.raises(ConfigError, match="not for 'evaluate'"):
        run(net, profile(), tmp_path / "r", max_drop=0.1, **more)
    path = tmp_path / "recipe.toml"
    for wanted, needed, given in (("fp16", "parity", "int8"), ("int8", "int8", "parity")):
        path.write_text(f'reader = "random"\npurposes = ["{given}"]')
        with pytest.raises(ConfigError, match=f"not for '{needed}'"):
            lowering.lower_file(small, tmp_path, LoweringOptions(wanted), str(path), print)


def test_a_bare_file_is_lowered_beside_its_engine_and_says_so(small, tmp_path):
    heard = []
    out = tmp_path / "out"
    made = lowering.lower_file(small, out, LoweringOptions("int8"), "random", heard.append)
    assert made.path == out / "small.int8.onnx"
    assert "QuantizeLinear" in kinds(made.path)
    assert [step.stage for step in heard] == [NOTICE] and "RANDOM" in heard[0].detail
    assert any("RANDOM" in note for note in made.notes)
    again = lowering.lower_file(made.path, out, LoweringOptions("int8"), None, heard.append)
    assert again.path == made.path, "what is quantised already is taken as it is"
    assert (
        lowering.lower_file(small, out, LoweringOptions("fp32"), None, heard.append).path == small
    )
    with pytest.raises(ConfigError, match="--data"):
        lowering.lower_file(small, out, LoweringOptions("int8"), None, heard.append)
    assert {p.name for p in out.iterdir()} == {"small.int8.onnx"}


def test_a_sweep_takes_data_for_int8_and_for_criteria_that_need_it(profile, tmp_path, capfd):
    from prune2deploy import cli

    (tmp_path / "mine.py").write_text(
        "import torch\nfrom torch import nn\ndef net():\n"
        "    torch.manual_seed(0)\n"
        "    body = nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3), nn.Flatten()\n"
        "    return nn.Sequential(*body).eval(), (torch.randn(1, 3, 8, 8),)\n"
    )
    line = ["sweep", "--model", f"{tmp_path / 'mine.py'}:net", "--target", str(profile())]
    line += ["--ratios", "0.5", "--json"]
    assert cli.run([*line, "--precision", "int8", "--out", str(tmp_path / "a")]) == 2
    assert "--data" in capfd.readouterr().err
    for extra in (["--precision", "int8"], ["--importance", "taylor"]):
        out = str(tmp_path / extra[1])
        assert cli.run([*line, *extra, "--data", "random", "--out", out]) == 0
        told = json.loads(capfd.readouterr().out)
        assert told["points"][0]["speedup"] > 1
        assert any("RANDOM" in note for note in told["notes"])
        quantised = "QuantizeLinear" in kinds(tmp_path / extra[1] / "baseline.onnx")
        assert quantised == ("int8" in extra)
        assert ("int8" in told["environment"]["target"]) == ("int8" in extra)


def test_each_runtime_names_its_form_of_int8():
    forms = {
        name: registry.for_target(profile).int8_recipe(profile)
        for name in ("ort", "ort-cuda", "openvino", "trt-rtx", "trt-int8")
        for profile in (target.load(name),)
    }
    assert forms.pop("ort") == "cpu"
    assert set(forms.values()) == {"tensorrt"}


class Leveled(Net):
    """Takes a number that has one valid value only, one alone, and what it does not read."""

    def __init__(self):
        super().__init__()
        self.levels = nn.Embedding(1, 10)

    def forward(self, x, level, gain, spare):
        return super().forward(x) * gain + self.levels(level)


@pytest.mark.parametrize("wanted", ["fp32", "fp16"])
def test_stages_are_compared_on_inputs_that_the_model_takes(profile, tmp_path, wanted):
    level, gain, spare = torch.zeros(1, dtype=torch.int64), torch.tensor(2.0), torch.ones(1, 2)
    example = (torch.randn(1, 3, 8, 8), level, gain, spare)
    target = profile(precision=wanted)
    found = run((Leveled().eval(), example), target, tmp_path / "r", max_builds=2)
    inputs, _ = onnx_file.signature(found.run_dir / "model.onnx")
    assert [one.name for one in inputs] == ["x", "level", "gain", "spare"]
    assert "cannot be compared" not in (found.run_dir / "report.json").read_text()


@pytest.mark.ort
def test_engines_are_timed_on_inputs_that_the_model_takes(profile, tmp_path):
    level, gain, spare = torch.zeros(1, dtype=torch.int64), torch.tensor(2.0), torch.ones(1, 2)
    example = (torch.randn(1, 3, 8, 8), level, gain, spare)
    found = run((Leveled().eval(), example), profile(ORT), tmp_path / "r", max_builds=1)
    assert found.measurement.candidate.p50_ms > 0
