import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper
from torch import nn

from prune2deploy.errors import ExportError, ParityError
from prune2deploy.exporting import parity
from prune2deploy.exporting.export import to_onnx

X = {"x": np.ones((1, 2), np.float32)}


def gives(**outputs):
    arrays = {name: np.asarray(value, np.float32) for name, value in outputs.items()}
    return lambda feeds: arrays


def test_equal_outputs_pass_with_zero_error():
    found = parity.compare(gives(a=[1, 2]), gives(a=[1, 2]), [X])
    assert (found.max_abs, found.max_rel, found.passed) == (0.0, 0.0, True)


def test_worst_output_is_named_with_both_figures():
    found = parity.compare(
        gives(a=[1, 100], b=[1, 2]), gives(a=[1, 101], b=[1, 2.5]), [X], tolerance=0.1
    )
    assert found.worst_output == "b"
    assert found.max_abs == pytest.approx(1.0)
    assert found.max_rel == pytest.approx(0.25)
    assert not found.passed


def test_small_channel_beside_a_large_one_is_held_to_its_own_scale():
    expected = np.stack([np.full((1, 9), 640.0), np.full((1, 9), 0.9)], axis=1)
    found = expected.copy()
    found[:, 1] = 0.1
    absolute, relative = parity.difference(expected, found)
    assert absolute == pytest.approx(0.8)
    assert relative > 0.4  # a plain ratio to the largest value would say 0.001


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_not_finite_on_one_side_fails_at_any_tolerance(bad):
    found = parity.compare(gives(a=[1, 2]), gives(a=[1, bad]), [X], tolerance=1e9)
    assert not found.passed
    assert found.max_rel == np.inf


def test_not_finite_on_both_sides_alike_agrees():
    assert parity.difference(np.array([np.inf, np.nan, 1]), np.array([np.inf, np.nan, 1])) == (0, 0)


def test_integers_count_the_share_that_differs():
    assert parity.difference(np.array([1, 2, 3, 4]), np.array([1, 2, 3, 9])) == (5.0, 0.25)


def test_outputs_that_are_zero_are_reported_as_vacuous():
    found = parity.compare(gives(a=[0, 0], b=[1]), gives(a=[0, 0], b=[1]), [X])
    assert found.vacuous == ("a",)


@pytest.mark.parametrize("value", [0.0, np.inf, -np.inf, np.nan])
def test_agreeing_on_what_is_no_finite_value_proves_nothing(value):
    output = {"a": np.full((2, 3), value, np.float32), "b": np.array([[value, 1.0]])}
    assert parity.compare(lambda _: output, lambda _: output, [{}]).vacuous == ("a",)
    if not np.isnan(value):
        assert parity.require_numbers(lambda _: output, [{}]) == ("a",)


def test_different_outputs_and_shapes_are_named():
    with pytest.raises(ParityError, match="a against a, b"):
        parity.compare(gives(a=[1]), gives(a=[1], b=[1]), [X])
    with pytest.raises(ParityError, match=r"'a' has shape \(1,\)"):
        parity.compare(gives(a=[1]), gives(a=[1, 2]), [X])


def test_outputs_with_other_names_are_matched_by_position():
    assert parity.compare(gives(a=[1], b=[2]), gives(p=[1], q=[2]), [X]).passed
    assert not parity.compare(gives(a=[1], b=[2]), gives(p=[2], q=[1]), [X]).passed


def test_no_samples_is_an_error_and_all_samples_count():
    with pytest.raises(ParityError, match="no samples"):
        parity.compare(gives(a=[1]), gives(a=[1]), [])
    assert parity.compare(gives(a=[1]), gives(a=[1]), [X, X, X]).samples == 3


def test_require_raises_with_output_figures_and_tolerance():
    found = parity.compare(gives(a=[1.0]), gives(a=[1.5]), [X])
    with pytest.raises(ParityError, match=r"torch and ONNX disagree.*'a'.*0\.5.*0\.001"):
        parity.require(found, "torch and ONNX")
    with pytest.raises(ParityError, match="both sides compute in fp32, so no higher precision"):
        parity.require(found, "torch and ONNX")
    lower = parity.compare(gives(a=[1.0]), gives(a=[1.5]), [X], precision="fp16")
    with pytest.raises(ParityError, match=r"Do not use the result; a higher precision may pass$"):
        parity.require(lower, "fp32 ONNX and fp16 ONNX")
    good = parity.compare(gives(a=[1.0]), gives(a=[1.0]), [X])
    assert parity.require(good, "") is good


@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(0.5, 2))
def test_difference_is_zero_only_for_equal_arrays_and_free_of_scale(values, factor):
    a = np.asarray(values, np.float64)
    b = a * factor
    absolute, relative = parity.difference(a, b)
    assert (absolute == 0) == bool(np.array_equal(a, b))
    if np.abs(a).max() > 1e-3:
        assert relative == pytest.approx(abs(factor - 1), rel=1e-6, abs=1e-9)


def test_changed_weight_in_the_file_is_found(tmp_path):
    net = nn.Linear(4, 3).eval()
    x = torch.randn(2, 4)
    path = to_onnx(net, (x,), tmp_path / "a.onnx")
    model = onnx.load(str(path))
    weight = next(t for t in model.graph.initializer if len(t.dims) == 2)
    changed = onnx.numpy_helper.to_array(weight) * 1.01
    weight.CopyFrom(onnx.numpy_helper.from_array(changed, weight.name))
    onnx.save(model, str(tmp_path / "b.onnx"))
    sample = parity.as_sample((x,))
    torch_side = parity.torch_runner(net, ())
    assert parity.compare(torch_side, parity.onnx_runner(path), [sample]).passed
    assert not parity.compare(torch_side, parity.onnx_runner(tmp_path / "b.onnx"), [sample]).passed


def test_random_samples_fit_the_file_are_not_zero_and_repeat(tmp_path):
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT16, ["n", 3]),
        helper.make_tensor_value_info("ids", TensorProto.INT64, [4]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT16, ["n", 3])]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", inputs, outputs)
    path = tmp_path / "a.onnx"
    onnx.save(helper.make_model(graph), str(path))
    one, two = parity.random_samples(path, count=2)
    assert one["x"].shape == (2, 3)
    assert one["x"].dtype == np.float16
    assert np.all(one["x"] != 0)
    assert set(one["ids"]) <= {0, 1}
    assert not np.array_equal(one["x"], two["x"])
    np.testing.assert_array_equal(parity.random_samples(path)[0]["x"], one["x"])


def test_whole_numbers_of_random_samples_are_those_of_an_example(tmp_path):
    class Picks(nn.Module):
        def forward(self, x, place):
            return x[:, place]

    example = (torch.randn(1, 3), torch.tensor([2]))
    path = to_onnx(Picks(), example, tmp_path / "a.onnx", input_names=("x", "place"))
    like = parity.as_sample(example, ("x", "place"))
    (found,) = parity.random_samples(path, like=like)
    assert found["place"].tolist() == [2]
    assert not np.array_equal(found["x"], like["x"])


def test_inputs_that_a_file_does_not_take_are_told(tmp_path):
    path = to_onnx(nn.Embedding(1, 3), (torch.zeros(1, dtype=torch.int64),), tmp_path / "a.onnx")
    with pytest.raises(ExportError, match=r"cannot run .*out of data bounds"):
        parity.onnx_runner(path)({"input": np.array([1])})


def test_names_of_classes_are_compared_by_how_many_differ():
    expected, found = np.zeros((1, 100), np.int64), np.zeros((1, 100), np.int64)
    found[0, :3] = 20
    one = parity.compare(lambda _: {"a": expected}, lambda _: {"a": found}, [X], precision="int8")
    assert one.error == one.rms_rel == one.max_rel == 0.03
    texts = np.array(["a", "b"], object), np.array(["a", "c"], object)
    assert parity.difference(*texts) == (1.0, 0.5)


def test_a_file_that_cannot_be_loaded_and_a_training_module_are_refused(tmp_path):
    (tmp_path / "bad.onnx").write_bytes(b"not onnx")
    with pytest.raises(ExportError, match="cannot load"):
        parity.onnx_runner(tmp_path / "bad.onnx")
    with pytest.raises(ExportError, match="eval"):
        parity.torch_runner(nn.Linear(1, 1), ())


def test_a_module_is_run_on_its_own_device():
    class Elsewhere(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(2, device="meta"))

        def forward(self, x):
            assert x.device == self.weight.device
            return torch.ones(x.shape)

    run = parity.torch_runner(Elsewhere().eval())
    assert run({"input": np.zeros((1, 2), np.float32)})["output"].tolist() == [[1, 1]]
