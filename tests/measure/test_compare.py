import dataclasses

import pytest

from prune2deploy import measure
from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine
from prune2deploy.errors import BuildError
from prune2deploy.measure import child, samples
from prune2deploy.target import MeasurePolicy
from prune2deploy.timing import OperatorTiming

OPTIONS = {"step": 16, "ns_per_mac": 0.5, "fixed_ns": 100.0}
QUICK = MeasurePolicy(min_seconds=0.3, max_seconds=4.0, half_width=0.05)


def test_the_null_backend_gives_its_formula_back(make_target, make_onnx, tmp_path):
    null, target = registry.get("null"), make_target("null", options=OPTIONS)
    wide = null.build(make_onnx(64, "wide.onnx"), target, tmp_path / "out")
    slim = null.build(make_onnx(16, "slim.onnx"), target, tmp_path / "out")
    found = measure.compare(slim, wide, target, raw_path=tmp_path / "raw.npz")

    def ns(engine):
        return sum(t.ns for t in measure.profile(engine, target))

    assert found.ratio == pytest.approx(ns(slim) / ns(wide), rel=1e-4)
    assert found.candidate.p50_ms == pytest.approx(ns(slim) / 1e6, rel=1e-4)
    assert found.control_ratio == 1.0
    assert samples.load(tmp_path / "raw.npz").candidate.shape[1] == 3
    assert measure.single(wide, target).latency.p50_ms == pytest.approx(ns(wide) / 1e6, rel=1e-4)


def test_the_null_backend_with_noise_covers_its_formula(make_target, make_onnx, tmp_path):
    options = {**OPTIONS, "noise": 0.05}
    null, target = registry.get("null"), make_target("null", options=options)
    wide = null.build(make_onnx(64, "wide.onnx"), target, tmp_path / "out")
    slim = null.build(make_onnx(16, "slim.onnx"), target, tmp_path / "out")
    found = measure.compare(slim, wide, target)
    truth = sum(t.ns for t in null.profile(slim, target, {}, 1)) / sum(
        t.ns for t in null.profile(wide, target, {}, 1)
    )
    width = found.ratio_ci95[1] - found.ratio_ci95[0]
    assert 0 < width < 0.03 * truth
    assert abs(found.ratio - truth) < width
    assert found.stopped == "precise"


@pytest.mark.ort
def test_real_engines_are_timed_in_a_child(make_target, make_onnx, tmp_path):
    pytest.importorskip("onnxruntime")
    ort = registry.get("ort")
    target = dataclasses.replace(make_target(), measure=QUICK)
    wide = ort.build(make_onnx(256, "wide.onnx"), target, tmp_path / "out")
    slim = ort.build(make_onnx(16, "slim.onnx"), target, tmp_path / "out")
    goal = measure.Goal(1000.0)
    found = measure.compare(slim, wide, target, raw_path=tmp_path / "raw.npz", goal=goal)
    assert found.ratio_ci95[1] < 1.0
    assert found.candidate.samples >= 30
    assert found.fingerprint["versions"]["onnxruntime"]
    assert found.fingerprint["threads"] == 1
    names = [t.output_shapes[0] for t in measure.profile(slim, target, runs=3) if t.kind == "Conv"]
    assert names == [(1, 16, 12, 12), (1, 8, 10, 10)]


@pytest.mark.ort
def test_a_profile_is_scaled_to_the_speed_of_an_earlier_one(
    make_target, make_onnx, tmp_path, monkeypatch
):
    pytest.importorskip("onnxruntime")
    ort, target = registry.get("ort"), make_target()
    wide = ort.build(make_onnx(64, "wide.onnx"), target, tmp_path / "out")
    slim = ort.build(make_onnx(16, "slim.onnx"), target, tmp_path / "out")
    seen, work = [], child.run

    def noted(*arguments):
        seen.append(work(*arguments))
        return seen[-1]

    monkeypatch.setattr(child, "run", noted)
    earlier = [OperatorTiming(name, "Conv", (), (), 5e8) for name in "ab"]
    found = measure.profile(slim, target, runs=4, beside=(wide, earlier))
    raw = [o["ns"] for o in seen[-1]["operators"]]
    before, after = seen[-1]["reference_ns"]
    assert before > 0 and after > 0
    speed = 1e9 / (before * after) ** 0.5
    assert [t.ns for t in found] == pytest.approx([speed * ns for ns in raw])
    plain = measure.profile(slim, target, runs=4)
    assert seen[-1]["reference_ns"] == []
    assert [t.ns for t in plain] == [o["ns"] for o in seen[-1]["operators"]]


@pytest.mark.ort
def test_an_engine_that_does_not_open_is_the_child_s_error(make_target, tmp_path):
    pytest.importorskip("onnxruntime")
    path = tmp_path / "broken.onnx"
    path.write_bytes(b"nothing")
    engine = Engine(path, path, "ort", 0.0)
    with pytest.raises(BuildError, match=r"broken\.onnx"):
        measure.single(engine, make_target())
