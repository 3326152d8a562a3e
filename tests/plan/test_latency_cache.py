"""The cache keeps timings by content, and survives what happens to files."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from prune2deploy.errors import ConfigError
from prune2deploy.graph import trace
from prune2deploy.plan.costs import Point
from prune2deploy.plan.latency_cache import Context, LatencyCache, model_key
from prune2deploy.plan.latency_model import fit, points_of
from prune2deploy.plan.probes import probes

from .made import builds, chain

X = torch.zeros(1, 3, 4, 4)
HERE = Context("cpu-1", "ort 1.32", "fp32", 1)


def test_builds_come_back_as_they_were_and_fit_the_same_model(tmp_path):
    graph = chain((64, 64, 128))
    made = builds(graph, [{}, *probes(graph, 3, multiple=16)])
    with LatencyCache.open(tmp_path / "cache.sqlite", HERE) as cache:
        for build in made:
            cache.add_build(model_key(graph), build)
    with LatencyCache.open(tmp_path / "cache.sqlite", HERE) as cache:
        again = cache.builds(model_key(graph))
    assert again == tuple(made)
    plan = probes(graph, 1, multiple=16, seed=9)[0]
    one, other = (fit(graph, b, multiple=16).predict(plan) for b in (made, again))
    assert one == other


def test_cells_are_found_by_signature_and_the_least_time_stays(tmp_path):
    graph = chain((64, 64))
    points = points_of(graph, builds(graph, [{}, *probes(graph, 2, multiple=16)]))
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        cache.add_points(points)
        slower = [Point(p.kind, p.signature, p.work, 2 * p.ns) for p in points]
        cache.add_points(slower)
        found = cache.points([points[0].signature])
    expected = {(p.work, p.ns) for p in points if p.signature == points[0].signature}
    assert {(p.work, p.ns) for p in found} == expected


def test_work_that_is_padded_otherwise_is_other_work(tmp_path):
    """A width of 20 is 32 on a device with blocks of 16, and stays 20 with blocks of 4."""
    wide, narrow = (Point("Conv", "Conv(*)", (w, w, w), 4.0) for w in (32.0, 20.0))
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        cache.add_points([wide], 16)
        cache.add_points([narrow], 4)
        assert cache.points(["Conv(*)"], 16) == (wide,)
        assert cache.points(["Conv(*)"], 4) == (narrow,)


@pytest.mark.parametrize(
    "other",
    [
        Context("cpu-2", "ort 1.32", "fp32", 1),
        Context("cpu-1", "ort 1.33", "fp32", 1),
        Context("cpu-1", "ort 1.32", "fp16", 1),
        Context("cpu-1", "ort 1.32", "fp32", 2),
    ],
)
def test_another_device_runtime_precision_or_thread_count_shares_nothing(tmp_path, other):
    point = Point("Conv", "Conv(*)", (1.0, 2.0, 3.0), 4.0)
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        cache.add_points([point])
        cache.add_staircase("conv3x3", {64: 1.5})
    with LatencyCache.open(tmp_path / "c", other) as cache:
        assert cache.points(["Conv(*)"]) == ()
        assert cache.staircase("conv3x3") is None
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        assert cache.points(["Conv(*)"]) == (point,)
        assert cache.staircase("conv3x3") == {64: 1.5}


def test_models_of_other_widths_have_other_keys():
    assert model_key(chain((64, 64))) == model_key(chain((64, 64)))
    assert model_key(chain((64, 64))) != model_key(chain((64, 32)))


def test_models_of_other_activations_have_other_keys():
    keys = {
        model_key(trace(nn.Sequential(nn.Conv2d(3, 8, 1), act, nn.Conv2d(8, 2, 1)), X))
        for act in (nn.ReLU(), nn.SiLU(), nn.ReLU())
    }
    assert len(keys) == 2


def test_a_file_that_is_no_cache_is_named(tmp_path):
    path = tmp_path / "c"
    path.write_text("this is not a database, whatever its name says" * 20)
    with pytest.raises(ConfigError, match="delete the file"), LatencyCache.open(path, HERE):
        pass
    other = tmp_path / "d"
    connection = sqlite3.connect(other)
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with pytest.raises(ConfigError, match="schema 7"), LatencyCache.open(other, HERE):
        pass


def test_a_failing_user_leaves_the_file_as_it_was(tmp_path):
    point = Point("Conv", "Conv(*)", (1.0, 2.0, 3.0), 4.0)
    with pytest.raises(KeyError), LatencyCache.open(tmp_path / "c", HERE) as cache:
        cache.add_points([point])
        raise KeyError
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        assert cache.points(["Conv(*)"]) == ()


def test_several_writers_at_once(tmp_path):
    def write(number):
        with LatencyCache.open(tmp_path / "c", HERE) as cache:
            cache.add_points([Point("Conv", "Conv(*)", (float(number), 0.0, 0.0), 1.0)])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(16)))
    with LatencyCache.open(tmp_path / "c", HERE) as cache:
        assert len(cache.points(["Conv(*)"])) == 16
