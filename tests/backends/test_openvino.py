import numpy as np
import pytest

from prune2deploy.backends import registry
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.errors import BackendError, BuildError, ConfigError

pytest.importorskip("openvino")


@pytest.fixture
def openvino():
    return registry.get("openvino")


def test_it_agrees_with_the_reference_in_single_precision(
    openvino, make_target, make_onnx, tmp_path
):
    reference = pytest.importorskip("onnx.reference")
    target, path = make_target("openvino"), make_onnx(20)
    assert openvino.availability(target).usable
    engine = openvino.build(path, target, tmp_path / "out")
    with openvino.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=0)
        found = session.run(feeds)["y"]
        session.prepare(feeds)
        assert session.time_once().wall_ns > 0
    wanted = reference.ReferenceEvaluator(str(path)).run(None, feeds)[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)  # bfloat16 would be off by 1e-3


def test_inputs_that_do_not_fit_are_errors_of_the_backend(
    openvino, make_target, make_onnx, tmp_path
):
    target = make_target("openvino")
    with openvino.open(openvino.build(make_onnx(), target, tmp_path / "out"), target) as session:
        wrong = {"x": np.ones((1, 3, 5, 12), np.float32)}
        for use in (session.run, session.prepare):
            with pytest.raises(BackendError, match="input 'x' was not given; found none, expected"):
                use({})
        with pytest.raises(BackendError, match="OpenVINO failed to run"):
            session.run(wrong)
        session.prepare(wrong)
        with pytest.raises(BackendError, match="OpenVINO failed to run"):
            session.time_once()
    engine = openvino.build(make_onnx(), target, tmp_path / "out")
    for feeds, told in ((wrong, "OpenVINO failed to run"), ({}, "input 'x' was not given")):
        with pytest.raises(BackendError, match=told):
            openvino.profile(engine, target, feeds, 1)


def test_an_input_without_dimensions_is_taken(openvino, make_target, tmp_path):
    onnx = pytest.importorskip("onnx")
    tensor, kind = onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    nodes = [onnx.helper.make_node("Mul", ["x", "scale"], ["y"])]
    inputs = [tensor("x", kind, [4]), tensor("scale", kind, [])]
    graph = onnx.helper.make_graph(nodes, "net", inputs, [tensor("y", kind, [4])])
    opsets = [onnx.helper.make_opsetid("", 17)]
    path = tmp_path / "scaled.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    target = make_target("openvino")
    with openvino.open(openvino.build(path, target, tmp_path / "out"), target) as session:
        session.prepare({"x": np.ones(4, np.float32), "scale": np.float32(3) * np.ones((), "f4")})
        assert session.time_once().wall_ns > 0
        assert session._request.get_tensor("scale").data == 3


def test_its_counters_give_a_profile(openvino, make_target, make_onnx, tmp_path):
    target = make_target("openvino")
    engine = openvino.build(make_onnx(20), target, tmp_path / "out")
    with openvino.open(engine, target) as session:
        feeds = random_feeds(session.inputs, seed=0)
    timings = openvino.profile(engine, target, feeds, runs=5)
    shapes = [t.output_shapes for t in timings if t.kind == "Convolution"]
    assert shapes == [((1, 20, 12, 12),), ((1, 8, 10, 10),)]


def test_a_device_that_is_not_there_says_which_are(openvino, make_target):
    found = openvino.availability(make_target("openvino", device="npu"))
    assert not found.usable
    assert "NPU" in found.reason and "CPU" in found.reason


def test_fewer_than_one_stream_is_refused(make_target):
    with pytest.raises(ConfigError, match=r"options\.streams: found 0, expected 1 or more"):
        registry.for_target(make_target("openvino", options={"streams": 0}))


def test_a_bad_file_is_named(openvino, make_target, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"nothing")
    with pytest.raises(BuildError, match=r"bad\.onnx"):
        openvino.build(path, make_target("openvino"), tmp_path / "out")
