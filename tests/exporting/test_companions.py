import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from prune2deploy.exporting.companions import companions, copy, digest, size


def branch(name, sign):
    value = helper.make_tensor_value_info(f"{name}_out", TensorProto.FLOAT, [1, 4])
    weight = numpy_helper.from_array(sign * np.eye(4, dtype=np.float32), name)
    node = helper.make_node("MatMul", ["x", name], [f"{name}_out"])
    return helper.make_graph([node], name, [], [value], [weight])


@pytest.fixture
def forked(tmp_path):
    """A file whose only weights lie in the branches of an If, and those in another file."""
    node = helper.make_node(
        "If", ["way"], ["y"], then_branch=branch("a", 1), else_branch=branch("b", -1)
    )
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4]),
        helper.make_tensor_value_info("way", TensorProto.BOOL, []),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4])]
    opset = helper.make_opsetid("", 17)
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[opset], ir_version=8)
    path = tmp_path / "forked.onnx"
    onnx.save_model(
        model, str(path), save_as_external_data=True, size_threshold=0, location="forked.data"
    )
    return path


def test_weights_in_branches_are_found(forked):
    assert companions(forked) == ("forked.data",)


def test_a_hash_covers_the_files_beside(forked):
    before = digest(forked)
    assert digest(forked) == before
    data = forked.with_name("forked.data")
    data.write_bytes(bytes(reversed(data.read_bytes())))
    assert digest(forked) != before


def test_copies_in_one_folder_have_weights_of_their_own(forked, tmp_path):
    before = forked.read_bytes()
    for name in ("a.onnx", "b.onnx"):
        copy(forked, tmp_path / name)
        assert companions(tmp_path / name) == (f"{name}.data",)
        assert size(tmp_path / name) == (tmp_path / name).stat().st_size + 2 * 64
    assert forked.read_bytes() == before
    (tmp_path / "forked.data").unlink()
    (tmp_path / "b.onnx.data").write_bytes(bytes(128))
    x = np.arange(4, dtype=np.float32)[None]
    for name, factor in (("a.onnx", 1), ("b.onnx", 0)):
        (found,) = ReferenceEvaluator(str(tmp_path / name)).run(
            None, {"x": x, "way": np.array(True)}
        )
        np.testing.assert_array_equal(found, factor * x)
