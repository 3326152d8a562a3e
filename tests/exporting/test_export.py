import errno
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prune2deploy import atomic
from prune2deploy.errors import ExportError
from prune2deploy.exporting import parity
from prune2deploy.exporting.export import flatten, to_onnx


class Net(nn.Module):
    """A small convolutional net with BatchNorm, so that train and eval mode differ."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


class Nested(Net):
    def forward(self, x):
        features = self.body(x)
        logits = self.head(features.mean((2, 3)))
        return OrderedDict(logits=logits, maps=[features, (None, features * 2)])


class BatchBaked(Net):
    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)).reshape(int(x.shape[0]) * 4, 2).reshape(-1, 8))


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, 12)


@pytest.fixture
def image():
    return torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_exported_file_gives_the_outputs_of_the_module(tmp_path, image):
    net = Net().eval()
    path = to_onnx(net, (image,), tmp_path / "deep" / "net.onnx")
    found = parity.compare(
        parity.torch_runner(net, ()), parity.onnx_runner(path), [parity.as_sample((image,))]
    )
    assert found.passed
    assert found.max_rel < 1e-5
    assert list(path.parent.iterdir()) == [path]


def test_module_and_its_training_flags_are_left_alone(tmp_path, image):
    net = Net().train()
    net.body.eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    to_onnx(net, (image,), tmp_path / "net.onnx")
    assert net.training
    assert net.head.training
    assert not net.body.training
    assert not net.body[1].training
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_nested_outputs_are_flattened_in_order_and_named(tmp_path, image):
    net = Nested().eval()
    path = to_onnx(net, (image,), tmp_path / "net.onnx")
    graph = onnx.load(str(path)).graph
    names = ["output_logits", "output_maps_0", "output_maps_1_1"]
    assert [o.name for o in graph.output] == names
    outputs = parity.onnx_runner(path)({"input": image.numpy()})
    np.testing.assert_allclose(outputs[names[2]], outputs[names[1]] * 2, rtol=1e-6)


def test_names_and_opset_are_as_asked(tmp_path, image):
    path = to_onnx(
        Net(), (image,), tmp_path / "n.onnx", input_names=["pixels"], output_names=["y"], opset=17
    )
    model = onnx.load(str(path))
    assert [i.name for i in model.graph.input] == ["pixels"]
    assert [o.name for o in model.graph.output] == ["y"]
    assert model.opset_import[0].version == 17


@pytest.mark.parametrize("dynamo", [False, True])
def test_free_batch_runs_with_another_batch(tmp_path, image, dynamo):
    net = Net().eval()
    path = to_onnx(net, (image[:1],), tmp_path / "n.onnx", dynamic_batch=True, dynamo=dynamo)
    feeds = {"input": np.random.default_rng(0).standard_normal((5, 3, 8, 8), np.float32)}
    found = parity.compare(parity.torch_runner(net, ()), parity.onnx_runner(path), [feeds])
    assert found.passed
    assert list(tmp_path.iterdir()) == [path]


def test_batch_written_into_a_reshape_is_refused(tmp_path):
    with pytest.raises(ExportError, match="batch"):
        to_onnx(FixedBatch(), (torch.randn(2, 3, 4),), tmp_path / "n.onnx", dynamic_batch=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "message"),
    [
        (nn.Linear(7, 3), "forward pass fails on inputs of shape"),
        (nn.Module(), "forward pass fails"),
    ],
)
def test_failing_forward_is_named_and_leaves_nothing(tmp_path, image, module, message):
    with pytest.raises(ExportError, match=message):
        to_onnx(module, (image,), tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())


def test_attention_modules_export_and_the_fused_path_is_on_again(tmp_path):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(1, 5, 8)
    path = to_onnx(layer, (x,), tmp_path / "n.onnx")
    found = parity.compare(
        parity.torch_runner(layer), parity.onnx_runner(path), [parity.as_sample((x,))]
    )
    assert found.passed
    assert torch.backends.mha.get_fastpath_enabled()


def test_default_arguments_of_forward_do_not_become_inputs(tmp_path, image):
    class Switch(Net):
        def forward(self, x, doubled=False, factor=3.0):
            return super().forward(x) * (2.0 if doubled else factor)

    net = Switch().eval()
    before = dict(vars(net))
    path = to_onnx(net, (image,), tmp_path / "n.onnx")
    assert [i.name for i in onnx.load(str(path)).graph.input] == ["input"]
    assert vars(net) == before
    sample = parity.as_sample((image,))
    assert parity.compare(parity.torch_runner(net), parity.onnx_runner(path), [sample]).passed


def test_names_of_weights_are_those_of_the_module(tmp_path, image):
    path = to_onnx(Nested(), (image,), tmp_path / "n.onnx")
    names = {t.name for t in onnx.load(str(path)).graph.initializer}
    assert {"head.weight", "head.bias"} <= names


def test_operator_without_onnx_form_is_an_export_error(tmp_path):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError, match=r"torch\.onnx\.export failed"):
        to_onnx(Odd(), (torch.randn(3, 3),), tmp_path / "n.onnx")
    assert not list(tmp_path.iterdir())


def test_model_without_tensors_in_its_output_is_refused(tmp_path, image):
    class Silent(nn.Module):
        def forward(self, x):
            return {"loss": None}

    with pytest.raises(ExportError, match="returns no tensor"):
        to_onnx(Silent(), (image,), tmp_path / "n.onnx")


def test_unknown_container_is_refused_with_its_place():
    with pytest.raises(ExportError, match="'output_a'"):
        flatten({"a": object()})


def test_full_disk_keeps_the_old_file_and_leaves_no_other(tmp_path, image, monkeypatch):
    path = tmp_path / "net.onnx"
    path.write_bytes(b"old")

    def full(*_, **__):
        (next(tmp_path.glob(".part-*")) / "net.onnx").write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch.onnx, "export", full)
    with pytest.raises(OSError, match="No space left"):
        to_onnx(Net(), (image,), path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_interrupted_write_leaves_what_was_there(tmp_path):
    path = tmp_path / "a.json"
    atomic.write_text(path, "first")

    def write_half():
        with atomic.replacing(path) as temporary:
            temporary.write_text("sec")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "first"
    assert list(tmp_path.iterdir()) == [path]


def test_a_really_full_disk(tmp_path):
    """Writing to ``/dev/full`` fails as a full disk does."""
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with pytest.raises(OSError, match="No space left"), atomic.replacing(tmp_path / "a") as name:
        name.symlink_to("/dev/full")
        name.write_bytes(b"x" * 100_000)
    assert not list(tmp_path.iterdir())
