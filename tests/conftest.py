import sys
from pathlib import Path

import numpy as np
import pytest

from prune2deploy import target


@pytest.fixture(autouse=True)
def no_cache_of_the_users(monkeypatch):
    """Tests that want a cache of timings name a folder of their own."""
    monkeypatch.setenv("PRUNE2DEPLOY_CACHE", "off")


@pytest.fixture(autouse=True)
def subnormals_as_the_standard_says():
    """Engines opened in this process flush subnormal numbers, which would outlive their test."""
    yield
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.set_flush_denormal(False)


@pytest.fixture
def make_target(tmp_path):
    """Write a profile and load it."""

    def make(backend: str = "ort", **changes: object) -> target.Target:
        options = changes.pop("options", {})
        top = {"backend": backend, "device": "cpu", "threads": 1, **changes}
        lines = [f"{k} = {_toml(v)}" for k, v in top.items()]
        lines += ["[options]", *(f"{k} = {_toml(v)}" for k, v in options.items())]
        path = tmp_path / "test.toml"
        path.write_text("\n".join(lines))
        return target.load(path)

    return make


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


@pytest.fixture
def make_onnx(tmp_path):
    """Write conv(3, width) - relu - conv(width, 8) - sigmoid on 1x3x12x12."""
    onnx = pytest.importorskip("onnx")

    def make(width: int = 16, name: str = "net.onnx", scale: float = 0.1) -> Path:
        random = np.random.default_rng(0)

        def weight(key: str, *shape: int):
            values = (scale * random.standard_normal(shape)).astype(np.float32)
            return onnx.numpy_helper.from_array(values, key)

        node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
        graph = onnx.helper.make_graph(
            [
                node("Conv", ["x", "w1", "b1"], ["c1"], name="conv1", pads=[1, 1, 1, 1]),
                node("Relu", ["c1"], ["r1"], name="relu1"),
                node("Conv", ["r1", "w2"], ["c2"], name="conv2"),
                node("Sigmoid", ["c2"], ["y"], name="last"),
            ],
            "net",
            [tensor("x", onnx.TensorProto.FLOAT, [1, 3, 12, 12])],
            [tensor("y", onnx.TensorProto.FLOAT, [1, 8, 10, 10])],
            [weight("w1", width, 3, 3, 3), weight("b1", width), weight("w2", 8, width, 3, 3)],
        )
        model = onnx.helper.make_model(
            graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=8
        )
        path = tmp_path / name
        onnx.save(model, str(path))
        return path

    return make
