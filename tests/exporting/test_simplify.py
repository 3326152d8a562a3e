import numpy as np
import onnx
import onnxsim
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from prune2deploy.errors import ExportError
from prune2deploy.exporting.export import to_onnx
from prune2deploy.exporting.simplify import count_nodes, custom_operators, simplify


class Roundabout(nn.Module):
    """Leaves foldable shape arithmetic in its export."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        y = self.conv(x)
        return y.reshape(y.shape[0], y.shape[1], -1).mean(-1) + torch.zeros(y.shape[1])


@pytest.fixture
def exported(tmp_path):
    return to_onnx(Roundabout(), (torch.randn(1, 3, 6, 6),), tmp_path / "raw.onnx")


def save(graph, path, domains=()):
    opsets = [helper.make_opsetid("", 17), *(helper.make_opsetid(d, 1) for d in domains)]
    onnx.save(helper.make_model(graph, opset_imports=opsets), str(path))
    return path


def vector(name, size=4):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, [size])


def test_result_has_fewer_nodes_is_no_larger_and_agrees(exported, tmp_path):
    report = simplify(exported, tmp_path / "out.onnx")
    assert report.applied
    assert report.note == ""
    assert report.parity.passed
    nodes = [count_nodes(onnx.load(str(path)).graph) for path in (report.path, exported)]
    assert nodes[0] < nodes[1]
    assert report.path.stat().st_size <= exported.stat().st_size


def test_file_can_be_replaced_in_place(exported):
    before = exported.stat().st_size
    report = simplify(exported, exported)
    assert report.path == exported
    assert exported.stat().st_size < before
    assert list(exported.parent.iterdir()) == [exported]


@pytest.mark.parametrize("kind", ["raises", "wrong", "larger", "invalid"])
def test_bad_simplification_keeps_the_file_and_says_why(exported, tmp_path, monkeypatch, kind):
    def fake(model, **_):
        changed = onnx.ModelProto()
        changed.CopyFrom(model)
        if kind == "raises":
            raise RuntimeError("no such kernel")
        if kind == "wrong":
            for tensor in changed.graph.initializer:
                array = numpy_helper.to_array(tensor)
                if array.ndim == 4:
                    tensor.CopyFrom(numpy_helper.from_array(array * 2, tensor.name))
        if kind == "larger":
            pad = numpy_helper.from_array(np.ones(9999, np.float32), "padding")
            changed.graph.initializer.append(pad)
        if kind == "invalid":
            changed.graph.node[0].op_type = "NoSuchOperator"
        return changed, True

    monkeypatch.setattr(onnxsim, "simplify", fake)
    report = simplify(exported, tmp_path / "out.onnx")
    assert not report.applied
    word = {"raises": "no such kernel", "wrong": "output", "larger": "larger", "invalid": "invalid"}
    assert word[kind] in report.note
    assert report.path.read_bytes() == exported.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"raw.onnx", "out.onnx"}


def test_a_checker_that_says_nothing_is_named_by_its_error(exported, tmp_path, monkeypatch):
    real = onnx.checker.check_model

    def mute(model):
        if isinstance(model, onnx.ModelProto):
            raise onnx.checker.ValidationError
        real(model)

    monkeypatch.setattr(onnx.checker, "check_model", mute)
    report = simplify(exported, tmp_path / "out.onnx")
    assert report.note == "onnxsim gave an invalid file: ValidationError"


def test_custom_operators_survive(tmp_path):
    constant = numpy_helper.from_array(np.ones(4, np.float32), "one")
    nodes = [
        helper.make_node("Add", ["one", "one"], ["two"]),
        helper.make_node("Mul", ["x", "two"], ["scaled"]),
        helper.make_node("Special", ["scaled"], ["y"], domain="mine", strength=3),
    ]
    graph = helper.make_graph(nodes, "g", [vector("x")], [vector("y")], [constant])
    path = save(graph, tmp_path / "raw.onnx", ["mine"])
    report = simplify(path, tmp_path / "out.onnx")
    after = onnx.load(str(report.path)).graph
    assert custom_operators(after) == {"mine::Special": 1}
    assert "mine::Special" in report.note
    node = next(n for n in after.node if n.op_type == "Special")
    assert node.attribute[0].i == 3


def test_custom_operator_that_goes_missing_is_noticed(tmp_path, monkeypatch):
    node = helper.make_node("Special", ["x"], ["y"], domain="mine")
    path = save(
        helper.make_graph([node], "g", [vector("x")], [vector("y")]), tmp_path / "r", ["mine"]
    )

    def drop(model, **_):
        model.graph.node[0].op_type, model.graph.node[0].domain = "Relu", ""
        return model, True

    monkeypatch.setattr(onnxsim, "simplify", drop)
    report = simplify(path, tmp_path / "out.onnx")
    assert not report.applied
    assert "mine::Special" in report.note


def test_free_batch_stays_free(tmp_path):
    path = to_onnx(
        Roundabout(), (torch.randn(2, 3, 6, 6),), tmp_path / "raw.onnx", dynamic_batch=True
    )
    report = simplify(path, tmp_path / "out.onnx")
    given = onnx.load(str(report.path)).graph.input[0]
    assert given.type.tensor_type.shape.dim[0].dim_param == "batch"


def test_missing_and_corrupt_files_are_export_errors(tmp_path):
    with pytest.raises(ExportError, match="does not exist"):
        simplify(tmp_path / "none.onnx", tmp_path / "out.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"\x00\x01 no onnx")
    with pytest.raises(ExportError, match=r"not a valid ONNX file: \w"):
        simplify(tmp_path / "bad.onnx", tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()


def test_weights_in_a_file_of_their_own_are_taken_along(exported, tmp_path):
    model = onnx.load(str(exported))
    big = tmp_path / "big"
    big.mkdir()
    onnx.save_model(
        model, str(big / "m.onnx"), save_as_external_data=True, location="m.data", size_threshold=0
    )
    report = simplify(big / "m.onnx", tmp_path / "new" / "m.onnx")
    assert not report.applied
    assert (tmp_path / "new" / "m.data").read_bytes() == (big / "m.data").read_bytes()
    onnx.checker.check_model(str(report.path))
