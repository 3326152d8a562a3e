"""What a run leaves in the user's cache spares the next one its probes, and never harms it."""

import os
import sqlite3
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.plan.costs import Point
from prune2deploy.plan.latency_cache import Context
from prune2deploy.rundir import read_manifest
from prune2deploy.search import recall
from prune2deploy.search.recall import FILE, Timings

from ..formula import formula_profile

HERE = Context("cpu", "ort", "fp32", 1)


class Net(nn.Module):
    """A stem and three blocks with shortcuts."""

    def __init__(self, widths=(64, 96, 48, 64)):
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, padding=1)
        inner = widths[1:]
        self.down = nn.ModuleList(nn.Conv2d(widths[0], n, 3, padding=1) for n in inner)
        self.up = nn.ModuleList(nn.Conv2d(n, widths[0], 3, padding=1) for n in inner)
        self.head = nn.Linear(widths[0], 10)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for down, up in zip(self.down, self.up, strict=True):
            x = x + torch.relu(up(torch.relu(down(x))))
        return self.head(x.mean((2, 3)))


@pytest.fixture
def place(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(recall.PLACE, str(folder))
    return folder


@pytest.fixture
def run(tmp_path):
    """Prune a net to a speed-up on a device of known latency."""

    def start(name, speedup, threads=1, widths=(64, 96, 48, 64), **more):
        target = tmp_path / f"formula{threads}.toml"
        target.write_text(formula_profile(threads))
        torch.manual_seed(0)
        net, example = Net(widths).eval(), torch.randn(1, 3, 8, 8)
        more = {"target": target, "run_dir": tmp_path / name, **more}
        return prune2deploy.prune_to_budget(net, example, speedup=speedup, **more)

    return start


def steps(result):
    return [line.step for line in result.report.steps]


def test_a_second_budget_needs_no_probes(run, place):
    first = run("a", 1.5)
    assert first.met and steps(first).count("probe") == 3
    second = run("b", 2.2)
    assert second.met and steps(second).count("probe") == 0
    assert 0.97 <= second.report.final.p50_ms / second.report.budget_ms <= 1
    assert second.report.builds <= 3
    assert "recalled" in " ".join(second.report.notes)
    third = run("c", 3.0, cache=False)
    assert steps(third).count("probe") == 3


def test_a_sibling_model_needs_fewer_probes(run, place):
    run("a", 1.5)
    sibling = run("b", 1.8, widths=(64, 96, 64, 48, 80))
    assert sibling.met and steps(sibling).count("probe") == 2
    assert 0.97 <= sibling.report.final.p50_ms / sibling.report.budget_ms <= 1
    assert "other models on this device" in " ".join(sibling.report.notes)
    stranger = run("c", 1.8, widths=(64, 96, 64, 48, 80), threads=2)
    assert steps(stranger).count("probe") == 3


def test_another_thread_count_shares_nothing(run, place):
    run("a", 1.5)
    assert steps(run("b", 1.5, threads=2)).count("probe") == 3


def test_a_resumed_run_goes_on_from_what_it_had_recalled(run, place):
    run("a", 1.5)
    seen = []

    def stop(step):
        seen.append(step)
        if step.stage == "measuring" and step.number == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("b", 2.2, progress=stop)
    run("c", 2.9)  # adds to the cache meanwhile
    (place / FILE).unlink()
    result = run("b", 2.2, resume=True)
    assert result.met and steps(result).count("probe") == 0


def test_a_damaged_cache_is_renamed_and_said_so(run, place):
    place.mkdir()
    (place / FILE).write_bytes(b"this is no database" * 100)
    result = run("a", 1.5)
    assert result.met and "damaged" in " ".join(result.report.notes)
    assert (place / f"{FILE}.damaged-1").read_bytes().startswith(b"this is no database")
    assert steps(run("b", 2.2)).count("probe") == 0
    with sqlite3.connect(place / FILE) as connection:
        connection.execute("UPDATE builds SET profile = '{broken'")
    connection.close()
    result = run("c", 3.0)
    assert result.met and steps(result).count("probe") == 3
    assert (place / f"{FILE}.damaged-2").exists()


def test_a_damaged_cache_that_cannot_be_renamed_is_told_once_and_left_alone(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(b"garbage" * 500)
    path.with_suffix(".lock").mkdir()
    timings = Timings(tmp_path, HERE)
    for _ in range(3):
        assert timings.points(["Conv(*)"], 1) == () and timings.staircase("conv1x1") is None
    assert len(timings.notes) == 1 and timings.notes[0].endswith("cannot be renamed; delete it")
    assert not timings.kept and path.read_bytes().startswith(b"garbage")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_folder_that_cannot_be_written_is_no_obstacle(run, place):
    place.mkdir()
    place.chmod(stat.S_IRUSR | stat.S_IXUSR)
    result = run("a", 1.5)
    assert result.met and "no timings of earlier runs" in " ".join(result.report.notes)


def test_a_place_that_is_a_file_is_no_obstacle(run, place):
    place.write_text("not a folder")
    result = run("a", 1.5)
    assert result.met and "no timings of earlier runs" in " ".join(result.report.notes)


def test_nothing_is_written_when_it_is_off(run, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    run("a", 1.5)  # the fixture of all tests has turned it off
    assert not (tmp_path / "xdg").exists()
    monkeypatch.setenv(recall.PLACE, "")
    assert recall.folder() == tmp_path / "xdg" / "prune2deploy"
    run("b", 1.5, cache=False)
    assert not (tmp_path / "xdg").exists()
    run("c", 1.5)
    assert (tmp_path / "xdg/prune2deploy" / FILE).exists()


def test_turning_the_cache_off_does_not_make_another_run(run, place):
    first = run("a", 1.5)
    again = run("a", 1.5, cache=False, resume=True)
    assert again.plan == first.plan
    assert read_manifest(first.run_dir)["met"]


def test_many_find_a_damaged_cache_at_once_and_none_loses_a_good_one(tmp_path):
    path = tmp_path / FILE
    path.write_bytes(b"garbage" * 500)
    point = Point("Conv", "Conv(*)", (1.0, 2.0, 3.0), 4.0)

    def work(_):
        timings = Timings(tmp_path, HERE)
        timings.points(["Conv(*)"], 1)
        timings._use(lambda cache: cache.add_points([point]), None)
        return timings.points(["Conv(*)"], 1)

    with ThreadPoolExecutor(6) as pool:
        found = list(pool.map(work, range(12)))
    assert found[-1] == (point,)
    assert len(list(tmp_path.glob("*.damaged-*"))) == 1
