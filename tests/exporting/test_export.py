import errno
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from prune2deploy import atomic, models
from prune2deploy.errors import ExportError
from prune2deploy.exporting import parity
from prune2deploy.exporting.export import flatten, input_names, to_onnx


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


class Stateful(Net):
    """Keeps more than tensors in its state."""

    def get_extra_state(self):
        return {"version": 2}


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


@pytest.mark.parametrize("dynamo", [False, True])
def test_a_state_may_hold_more_than_tensors(tmp_path, image, dynamo):
    net = Stateful().eval()
    path = to_onnx(net, (image,), tmp_path / "net.onnx", dynamo=dynamo)
    sample = [parity.as_sample((image,))]
    assert parity.compare(parity.torch_runner(net), parity.onnx_runner(path), sample).passed


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


class Alike(nn.Module):
    """Two paths to outputs spell the same name."""

    def forward(self, x):
        return {"a_b": x + 1, "a": {"b": x + 2, "b_2": x + 3}, "a_b_2": x + 4}


def test_outputs_whose_names_would_be_the_same_are_all_kept(tmp_path, image):
    path = to_onnx(Alike(), (image,), tmp_path / "net.onnx")
    found = parity.onnx_runner(path)({"input": image.numpy()})
    names = ["output_a_b", "output_a_b_2", "output_a_b_2_2", "output_a_b_2_3"]
    assert list(found) == names
    for i, name in enumerate(names):
        np.testing.assert_allclose(found[name], image.numpy() + i + 1, rtol=1e-6)
    assert parity.torch_runner(Alike().eval())({"input": image.numpy()}).keys() == found.keys()


def test_names_and_opset_are_as_asked(tmp_path, image):
    path = to_onnx(
        Net(), (image,), tmp_path / "n.onnx", input_names=["pixels"], output_names=["y"], opset=17
    )
    model = onnx.load(str(path))
    assert [i.name for i in model.graph.input] == ["pixels"]
    assert [o.name for o in model.graph.output] == ["y"]
    assert model.opset_import[0].version == 17


def test_several_inputs_are_named_as_in_the_forward_pass_where_that_is_unique():
    class Two(nn.Module):
        def forward(self, picture, /, mask, scale=1.0):
            return picture * mask

    class Stored(Two):
        def __init__(self):
            super().__init__()
            self.mask = nn.Parameter(torch.ones(1))

    class Any(nn.Module):
        def forward(self, *tensors):
            return tensors[0]

    assert input_names(2, Two()) == ("picture", "mask")
    assert input_names(1, Two()) == ("input",)
    for module in (Stored(), Any(), None):
        assert input_names(2, module) == ("input_0", "input_1")


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


def test_operator_without_onnx_form_is_an_export_error(tmp_path, capfd):
    class Odd(nn.Module):
        def forward(self, x):
            return torch.linalg.eigvals(x).real

    with pytest.raises(ExportError, match=r"torch\.onnx\.export cannot write .* Replace") as found:
        to_onnx(Odd(), (torch.randn(3, 3),), tmp_path / "n.onnx")
    assert "eigvals" in str(found.value) and "pull request" not in str(found.value)
    assert not list(tmp_path.iterdir())
    assert capfd.readouterr() == ("", "")  # not the whole graph, as torch would print it


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


class Deciding(nn.Module):
    """Goes on by sizes, by its own settings, or by values of its input."""

    def __init__(self, *ways):
        super().__init__()
        self.ways = ways
        self.register_buffer("limit", torch.tensor(3))

    def forward(self, x):
        if "sizes" in self.ways and x.shape[2] > 7:
            x = x * int(x.shape[0] / 1) + float(x.new_zeros(1))
        if "own" in self.ways and self.limit > 2:
            x = x[:, : int(self.limit)]
        if "branch" in self.ways and x.sum() > 0:  # here
            x = x * 2
        if "number" in self.ways:
            x = x / int(x.max() + 1)  # here
        if "numpy" in self.ways:
            x = x + float(x.detach().numpy().mean())  # here
        if "part" in self.ways:
            room = torch.zeros(4)
            room[:2] = x[0, 0, 0, :2]
            x = x * room.sum().item()  # here
        if "rows" in self.ways:
            x = torch.stack([row + 1 for row in x])
        return x


def line_of(way):
    lines = Path(__file__).read_text("utf-8").splitlines()
    first = next(i for i, line in enumerate(lines) if f'"{way}" in self.ways' in line)
    return next(i for i, line in enumerate(lines[first:], first + 1) if "# here" in line)


@pytest.mark.parametrize("way", ["branch", "number", "numpy", "part"])
def test_values_of_the_input_that_the_file_holds_for_good_are_told(
    tmp_path, image, way, monkeypatch
):
    monkeypatch.chdir(Path(__file__).parent)
    told = []
    model = Deciding("sizes", "own", way, "rows")
    to_onnx(model, (image,), tmp_path / "n.onnx", tell=told.append)
    assert len(told) == 1
    assert f"at {Path(__file__).name}:{line_of(way)}; the exported file holds" in told[0]
    with pytest.warns(UserWarning, match="values that depend on the input"):
        to_onnx(model, (image,), tmp_path / "n.onnx")


def test_sizes_and_settings_that_the_file_holds_are_right_in_it(tmp_path, image):
    told = []
    model = Deciding("sizes", "own", "rows")
    to_onnx(model, (image,), tmp_path / "n.onnx", tell=told.append)
    assert told == []


@pytest.mark.parametrize(
    ("library", "name"),
    [("torchvision", "resnet18"), ("torchvision", "swin_t"), ("ultralytics", "yolov8n.yaml"),
     ("timm", "timm:vit_tiny_patch16_224")],
)  # fmt: skip
def test_usual_models_hold_no_values_of_the_example(library, name, tmp_path):
    pytest.importorskip(library)
    loaded = models.load(name, input_size=(64, 64))
    told = []
    to_onnx(loaded.module, loaded.example_inputs, tmp_path / "n.onnx", tell=told.append)
    assert told == []
