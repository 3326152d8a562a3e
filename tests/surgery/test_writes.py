"""Writes to part of a tensor: the same values without the write, and the same in ONNX."""

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from prune2deploy.exporting.export import to_onnx
from prune2deploy.surgery.writes import make_functional


class Fill(nn.Module):
    def __init__(self, write):
        super().__init__()
        self.bias, self.write = nn.Parameter(torch.randn(6, 4)), write

    def forward(self, x):
        held = self.bias.clone()
        return self.write(held, x) + x @ torch.eye(4)


def zeroed(held, x):
    held[2:4].zero_()
    return held


def picked(held, x):
    held[-1].fill_(3.0)
    held[1].mul_(2.0)
    return held


def nested(held, x):
    held[1:, 2].copy_(x[1:, 0])
    held[:, :2][3:5].add_(x[0, :2])
    return held


def read_before_and_after(held, x):
    before = held[2:4] * 2
    held[2:4].zero_()
    return torch.cat([before, held[2:4], held[:2]])


def returned(held, x):
    part = held[1:3].fill_(2.0)
    return held + part.sum()


def last(held, x):
    held[-2:] = x[:2]
    return held


def twice(held, x):
    part = held[1:5]
    part.add_(x[:4]).mul_(0.5)
    part[:2].sub_(1.0)
    return held + part.sum()


def overlapping(held, x):
    whole, steps = held[1:5], held[::2]
    held[2:4].zero_()
    held[:3].add_(x[:3])
    return whole.sum() + steps.sum() + held


WRITES = [zeroed, picked, nested, read_before_and_after, returned, last, twice, overlapping]


def viewed(held, x):
    view = held.t()[None]
    held[2:4].zero_()
    return view.sum() + held


def transposed(held, x):
    held.t()[1:3].zero_()
    return held


def writes(module):
    names = [str(getattr(n.target, "_schema", "")).partition("(")[0] for n in module.graph.nodes]
    return [name for name in names if name.partition(".")[0].endswith("_")]


def captured(write):
    torch.manual_seed(0)
    return make_fx(Fill(write), tracing_mode="real")(torch.randn(6, 4))


@pytest.mark.parametrize("write", WRITES)
def test_partial_writes_become_values(write, tmp_path):
    module, x = captured(write), torch.randn(6, 4)
    expected = module(x)
    assert writes(module)
    make_functional(module.graph)
    module.graph.lint()
    module.recompile()
    assert not writes(module)
    torch.testing.assert_close(module(x), expected)
    to_onnx(module, (x,), tmp_path / "model.onnx")
    session = ort.InferenceSession(str(tmp_path / "model.onnx"))
    found = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    np.testing.assert_allclose(found, expected.detach().numpy(), atol=1e-6)


@pytest.mark.parametrize("write", [viewed, transposed])
def test_writes_to_memory_that_is_seen_otherwise_stay(write):
    module, x = captured(write), torch.randn(6, 4)
    expected = module(x)
    make_functional(module.graph)
    module.recompile()
    assert writes(module)
    torch.testing.assert_close(module(x), expected)


def test_what_a_model_stores_is_still_written_to():
    root = nn.Module()
    root.register_buffer("seen", torch.zeros(4))
    graph = torch.fx.Graph()
    x, seen = graph.placeholder("x"), graph.get_attr("seen")
    part = graph.call_function(torch.ops.aten.slice.Tensor, (seen, 0, 1, 2))
    graph.call_function(torch.ops.aten.add_.Tensor, (part, 1.0))
    graph.output(graph.call_function(torch.add, (x, seen)))
    make_functional(graph)
    module = torch.fx.GraphModule(root, graph)
    module(torch.zeros(4))
    assert module.seen.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize("shared", [False, True])
def test_memory_behind_a_reshape_is_followed_where_nothing_else_reads_it(shared):
    aten = torch.ops.aten
    graph = torch.fx.Graph()
    made = graph.call_function(aten.mul.Tensor, (graph.placeholder("x"), 2.0))
    seen = graph.call_function(torch.reshape, (made, [2, 3, 4]))
    part = graph.call_function(aten.slice.Tensor, (seen, 1, 1, 3))
    graph.call_function(aten.add_.Tensor, (part, 1.0))
    total = graph.call_function(aten.sum.default, (made if shared else seen,))
    graph.output(graph.call_function(aten.add.Tensor, (seen, total)))
    module, x = torch.fx.GraphModule(nn.Module(), graph), torch.randn(6, 4)
    expected = module(x)
    make_functional(graph)
    module.recompile()
    assert bool(writes(module)) == shared
    torch.testing.assert_close(module(x), expected)
