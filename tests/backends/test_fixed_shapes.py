"""Free dimensions of an ONNX file are given the values that were asked for, or are refused."""

import re

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from prune2deploy.backends.fixed_shapes import Wanted, fixed
from prune2deploy.backends.onnx_file import signature
from prune2deploy.errors import ConfigError


@pytest.fixture
def with_dims(make_onnx):
    """The small network with other dimensions of its input; the output's follow from them."""

    def make(*dims):
        path = make_onnx()
        model = onnx.load(str(path))
        for value, given in ((model.graph.input[0], dims), (model.graph.output[0], None)):
            named = given or (dims[0], 8, "out_height", "out_width")
            made = onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, named)
            value.CopyFrom(made)
        onnx.save(model, str(path))
        return path

    return make


@pytest.mark.parametrize(
    ("dims", "wanted", "found"),
    [
        (("n", 3, 12, 12), Wanted(), (1, 3, 12, 12)),
        (("n", 3, 12, 12), Wanted(5), (5, 3, 12, 12)),
        ((None, 3, None, None), Wanted(2, (16, 20)), (2, 3, 16, 20)),
        ((4, 3, "h", "w"), Wanted(4, (16, 20)), (4, 3, 16, 20)),
        (("n", 3, "s", "s"), Wanted(size=(16, 16)), (1, 3, 16, 16)),
    ],
)
def test_free_dimensions_take_the_values_asked_for(with_dims, tmp_path, dims, wanted, found):
    path = with_dims(*dims)
    made = fixed(path, tmp_path / "made", wanted)
    inputs, outputs = signature(made)
    batch, _, height, width = found
    assert inputs[0].shape == found
    assert outputs[0].shape == (batch, 8, height - 2, width - 2)
    assert signature(path)[0][0].shape != found, "the file itself is left alone"
    x = np.ones(found, np.float32)
    pair = [
        ort.InferenceSession(str(one), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for one in (path, made)
    ]
    np.testing.assert_array_equal(*pair)


def test_a_file_without_free_dimensions_is_taken_as_it_is(make_onnx, tmp_path):
    for wanted in (Wanted(), Wanted(1), Wanted(1, (12, 12))):
        assert fixed(make_onnx(), tmp_path / "made", wanted) == make_onnx()
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("dims", "wanted", "told"),
    [
        (("n", 3, "h", "w"), Wanted(), "input 'x' has dimensions (1, 3, h, w)"),
        (("n", 3, "h", "w"), Wanted(), "give --input-size HxW"),
        (("n", "c", 12, 12), Wanted(2, (12, 12)), "(2, c, 12, 12)"),
        (("n", "c", 12, 12), Wanted(2, (12, 12)), "export it with fixed shapes"),
        ((1, 3, 12, 12), Wanted(8), "(x (1, 3, 12, 12)), to which --batch 8 cannot apply"),
        (("n", 3, 12, 12), Wanted(1, (16, 12)), "--input-size 16x12 cannot apply"),
    ],
)
def test_dimensions_that_stay_free_or_cannot_be_set_are_named(
    with_dims, tmp_path, dims, wanted, told
):
    with pytest.raises(ConfigError, match=re.escape(told)):
        fixed(with_dims(*dims), tmp_path / "made", wanted)


def test_the_file_itself_is_not_overwritten(with_dims, make_onnx, tmp_path):
    path = with_dims("n", 3, 12, 12)
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"net\.onnx: found .*, which it lies in, .* another one"):
        fixed(path, path.parent, Wanted(2))
    assert path.read_bytes() == before
    assert fixed(make_onnx(), tmp_path, Wanted()) == path, "nothing is written where none is free"


def test_weights_beside_the_file_go_with_the_copy(with_dims, tmp_path):
    model = onnx.load(str(with_dims("n", 3, 12, 12)))
    (tmp_path / "apart").mkdir()
    path = tmp_path / "apart/net.onnx"
    onnx.save_model(model, str(path), save_as_external_data=True, size_threshold=0)
    made = fixed(path, tmp_path / "made", Wanted(3))
    x = {"x": np.ones((3, 3, 12, 12), np.float32)}
    session = ort.InferenceSession(str(made), providers=["CPUExecutionProvider"])
    assert session.run(None, x)[0].shape == (3, 8, 10, 10)


def test_a_length_that_is_the_first_dimension_of_another_input_stays_free(tmp_path):
    kinds = onnx.TensorProto.FLOAT
    given = [
        onnx.helper.make_tensor_value_info("x", kinds, ("batch", "seq", 8)),
        onnx.helper.make_tensor_value_info("places", kinds, ("seq",)),
    ]
    made = onnx.helper.make_tensor_value_info("y", kinds, ("batch", "seq", 8))
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "g", given, [made])
    onnx.save(onnx.helper.make_model(graph), str(tmp_path / "seq.onnx"))
    for wanted in (Wanted(), Wanted(4)):
        with pytest.raises(ConfigError, match=re.escape("(4, seq, 8)" if wanted.batch else "seq")):
            fixed(tmp_path / "seq.onnx", tmp_path / "made", wanted)


def test_inputs_and_outputs_that_are_no_tensors_of_numbers_are_named(tmp_path):
    helper, kinds = onnx.helper, onnx.TensorProto
    text = helper.make_tensor_value_info("words", kinds.STRING, [4])
    numbers = helper.make_tensor_value_info("x", kinds.FLOAT, [1, 4])
    cases = (
        ("StringNormalizer", {}, text, helper.make_tensor_value_info("y", kinds.STRING, [4])),
        ("SplitToSequence", {}, numbers, helper.make_tensor_sequence_value_info("y", 1, None)),
        ("Cast", {"to": 16}, numbers, helper.make_tensor_value_info("y", kinds.BFLOAT16, [1, 4])),
    )
    told = ("'words', a tensor of string", "'y', a sequence", "'y', a tensor of bfloat16")
    for (operator, attributes, given, made), words in zip(cases, told, strict=True):
        node = helper.make_node(operator, [given.name], ["y"], **attributes)
        opset = helper.make_opsetid("", 17)
        graph = helper.make_graph([node], "g", [given], [made])
        path = tmp_path / "net.onnx"
        onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=8), str(path))
        with pytest.raises(ConfigError, match=f"found {words}, among inputs and outputs"):
            fixed(path, tmp_path / "out", Wanted())
