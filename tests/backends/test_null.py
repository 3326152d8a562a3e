import dataclasses

import numpy as np
import pytest

from prune2deploy.backends import registry
from prune2deploy.backends.feeds import random_feeds

OPTIONS = {"step": 16, "ns_per_mac": 0.5, "fixed_ns": 100.0}


def test_latency_is_the_formula(make_target, make_onnx, tmp_path):
    null, target = registry.get("null"), make_target("null", options=OPTIONS)
    engine = null.build(make_onnx(20), target, tmp_path / "out")
    first = 12 * 12 * 9 * 16 * 32  # 3 -> 20 channels, both rounded up to 16
    second = 10 * 10 * 9 * 32 * 16  # 20 -> 8
    timings = {t.name: t.ns for t in null.profile(engine, target, {}, 1)}
    assert timings == {
        "conv1": 100 + 0.5 * first,
        "relu1": 100,
        "conv2": 100 + 0.5 * second,
        "last": 100,
    }
    with null.open(engine, target) as session:
        assert session.time_once().wall_ns == round(sum(timings.values()))


def test_widths_within_one_step_cost_the_same(make_target, make_onnx, tmp_path):
    null, target = registry.get("null"), make_target("null", options=OPTIONS)

    def ns(width):
        engine = null.build(make_onnx(width, f"w{width}.onnx"), target, tmp_path / "out")
        with null.open(engine, target) as session:
            return session.time_once().wall_ns

    assert ns(17) == ns(32) > ns(16) == ns(1)


def test_noise_is_seeded_and_leaves_the_median(make_target, make_onnx, tmp_path):
    null = registry.get("null")
    quiet = make_target("null", options=OPTIONS)
    engine = null.build(make_onnx(), quiet, tmp_path / "out")
    noisy = dataclasses.replace(quiet, options=(*quiet.options, ("noise", 0.1), ("seed", 3)))

    def samples(target):
        with null.open(engine, target) as session:
            return [session.time_once().wall_ns for _ in range(2001)]

    assert samples(noisy) == samples(noisy)
    assert len(set(samples(quiet))) == 1
    assert np.median(samples(noisy)) == pytest.approx(samples(quiet)[0], rel=0.01)
    assert np.std(np.log(samples(noisy))) == pytest.approx(0.1, rel=0.1)


def test_gemm_and_grouped_convolutions(make_target, tmp_path):
    onnx = pytest.importorskip("onnx")
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info

    def weight(name, *shape):
        return onnx.numpy_helper.from_array(np.ones(shape, np.float32), name)

    graph = onnx.helper.make_graph(
        [
            node("Conv", ["x", "w"], ["c"], name="depthwise", group=6),
            node("GlobalAveragePool", ["c"], ["p"], name="pool"),
            node("Flatten", ["p"], ["f"], name="flat"),
            node("Gemm", ["f", "g"], ["y"], name="gemm", transB=1),
        ],
        "net",
        [tensor("x", onnx.TensorProto.FLOAT, [2, 6, 5, 5])],
        [tensor("y", onnx.TensorProto.FLOAT, [2, 10])],
        [weight("w", 6, 1, 3, 3), weight("g", 10, 6)],
    )
    opsets = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "g.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    null, target = registry.get("null"), make_target("null", options={**OPTIONS, "step": 4})
    engine = null.build(path, target, tmp_path / "out")
    timings = {t.name: t.ns for t in null.profile(engine, target, {}, 1)}
    assert timings["depthwise"] == 100 + 0.5 * (2 * 9 * 9 * 1 * 8)
    assert timings["gemm"] == 100 + 0.5 * (2 * 8 * 12)


def test_it_runs_on_real_values(make_target, make_onnx, tmp_path):
    null, target = registry.get("null"), make_target("null")
    engine = null.build(make_onnx(), target, tmp_path / "out")
    with null.open(engine, target) as session:
        found = session.run(random_feeds(session.inputs, seed=0))
    assert found["y"].shape == (1, 8, 10, 10)
    assert (found["y"] > 0).all() and (found["y"] < 1).all()
