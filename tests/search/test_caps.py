"""Caps on size and arithmetic, and the curve of what more time would buy."""

import shutil

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.config import Budget, ModelOptions, RunOptions
from prune2deploy.errors import ConfigError, PlanError
from prune2deploy.report.text import gains, run_text

from ..formula import formula_profile


@pytest.fixture
def run(tmp_path):
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile())
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 64, 3), nn.ReLU(), nn.Conv2d(64, 96, 3), nn.ReLU(), nn.Conv2d(96, 64, 1),
        nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 8),
    ).eval()  # fmt: skip
    example = torch.randn(1, 3, 12, 12)

    def start(name, **more):
        return prune2deploy.prune_to_budget(
            net, example, target=path, run_dir=tmp_path / name, **more
        )

    return start


def test_a_cap_on_the_size_is_kept_and_is_the_files(run):
    result = run("r", speedup=1.2, max_size_mb=0.1)
    assert result.met
    assert result.report.final.bytes <= 100_000 < result.report.baseline.bytes
    assert sum(p.numel() for p in result.module.parameters()) * 4 > 70_000  # and is used


def test_a_cap_on_arithmetic_is_kept(run):
    whole = run("a", budget_ms=1000.0).report.baseline.macs
    result = run("b", budget_ms=1000.0, max_macs=whole // 3)
    assert result.met and whole / 5 < result.report.final.macs <= whole / 3
    free = run("c", budget_ms=1000.0, max_macs=whole)
    assert free.report.builds == 0


def test_a_cap_out_of_reach_is_an_error(run):
    with pytest.raises(PlanError, match="multiply-accumulates"):
        run("r", speedup=1.1, max_macs=10)
    for cap in ({"max_size_mb": 0.0}, {"max_size_mb": float("nan")}, {"max_macs": -1}):
        with pytest.raises(ConfigError, match="above 0"):
            RunOptions(Budget(speedup=2), "ort", **cap)


@pytest.mark.parametrize("speedup", [1.1, 30.0])
def test_a_cap_out_of_reach_is_told_before_anything_is_built(run, tmp_path, speedup):
    """Whether or not the latency is out of reach too: a model beyond a cap is never shipped."""
    for cap in ({"max_macs": 10}, {"max_size_mb": 1e-7}):
        with pytest.raises(PlanError, match="a cap of"):
            run("r", speedup=speedup, **cap)
        assert [one.name for one in (tmp_path / "r/builds").iterdir()] == ["00-baseline"]
        shutil.rmtree(tmp_path / "r")


def test_no_layer_loses_more_than_it_may(run):
    free = run("free", speedup=3.0).plan.counts
    sizes = {"0": 64, "2": 96, "4": 64}
    assert min(free[name] / sizes[name] for name in free) < 0.5
    held = run("held", speedup=1.8, max_pruning_ratio=0.5)
    assert held.met
    assert all(count >= sizes[name] / 2 for name, count in held.plan.counts.items())
    out = run("out", speedup=30.0, max_pruning_ratio=0.5)
    assert out.verdict == "unreachable"
    assert out.plan.counts == {name: size // 2 for name, size in sizes.items()}


def test_layers_that_are_kept_lose_nothing_and_the_budget_is_met(run):
    result = run("r", speedup=1.3, keep=["2"])
    assert result.met and result.module[2].out_channels == 96
    assert result.module[0].out_channels < 64
    assert next(a for a in result.report.axes if a.name == "2").frozen == "kept as asked"


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.5, float("nan")])
def test_a_pruning_ratio_that_cannot_be_a_limit_is_an_error(ratio):
    with pytest.raises(ConfigError, match="--max-pruning-ratio"):
        RunOptions(Budget(speedup=2), "ort", max_pruning_ratio=ratio)


def test_a_budget_that_no_other_widths_fill_is_explained(tmp_path):
    path = tmp_path / "formula.toml"
    path.write_text(formula_profile(channel_multiple=16, step=16))
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 48, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(48, 8),
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 12, 12)
    result = prune2deploy.prune_to_budget(
        net, x, target=path, speedup=1.7, run_dir=tmp_path / "r", cache=False
    )
    share = result.measurement.ratio * 1.7
    assert result.met and share < 0.97
    (told,) = [note for note in result.report.notes if "of the budget is used" in note]
    assert told.startswith(f"{100 * share:.1f} %")


def test_runs_without_caps_go_on_from_older_ones():
    options = RunOptions(Budget(speedup=2), "ort")
    assert not {"max_macs", "max_pruning_ratio", "cache"} & options.identity().keys()
    assert "keep" not in options.identity()["model"]
    kept = RunOptions(Budget(speedup=2), "ort", ModelOptions(keep=("fc",)))
    assert kept.identity()["model"]["keep"] == ["fc"]
    assert RunOptions(Budget(speedup=2), "ort", max_macs=5).identity()["max_macs"] == 5


def test_the_curve_rises_and_tells_what_time_would_buy(run):
    report = run("r", speedup=1.6).report
    times, worth = zip(*report.curve, strict=True)
    assert list(times) == sorted(times) and list(worth) == sorted(worth)
    assert 0 <= worth[0] < worth[-1] <= 1
    assert times[0] < report.final.p50_ms < times[-1]
    told = gains(report)
    shown = run_text(report)
    assert told and all(f"\npredicted {line}\n" in shown for line in told)
    assert told[-1] in run_text(report)
    low, high = (float(part.split("%")[0].split()[-1]) for part in told[-1].split("instead of"))
    assert low > high  # what would be kept against what is


def test_the_time_outside_operators_is_told_only_of_a_quiet_host(run, monkeypatch):
    import dataclasses

    from prune2deploy import measure

    real = measure.single

    def noisy(*args, **kwargs):
        return dataclasses.replace(real(*args, **kwargs), flags=("noisy host",))

    quiet = run("a", speedup=1.5)
    monkeypatch.setattr(measure, "single", noisy)
    loud = run("b", speedup=1.5)
    assert loud.report.limits.overhead_ms is None
    assert "outside operators" not in (loud.run_dir / "report.html").read_text()
    seen = quiet.report.limits.overhead_ms
    assert seen is None or seen == pytest.approx(0, abs=1e-4)  # the formula has none
