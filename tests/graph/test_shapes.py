"""Running on shapes: the same operators as on values, and values where code asks for them."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.errors import TraceError
from prune2deploy.graph import trace
from prune2deploy.graph.calling import tensors_in
from prune2deploy.graph.shape_kernels import KERNELS, Form
from prune2deploy.graph.shapes import NeedsValues, OnShapes, Outline, on_shapes, outlined
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.copying import copied
from prune2deploy.surgery.slicing import apply

LAST = torch.channels_last


def r(*shape):
    return torch.randn(*shape)


CALLS = {
    "contiguous": lambda: F.gelu(r(2, 3)) + r(2, 3) * 2.0,
    "broadcast": lambda: (r(2, 1, 3) + r(4, 1)) / r(1),
    "permuted": lambda: F.relu(r(2, 3, 4).permute(0, 2, 1)) * r(2, 4, 3),
    "in place": lambda: r(2, 3).add_(r(3)).mul_(2.0).sigmoid_(),
    "conv": lambda: F.conv2d(r(2, 4, 9, 8), r(6, 2, 3, 2), r(6), (2, 1), (1, 0), 2, 2),
    "conv1d": lambda: F.conv1d(r(1, 4, 9), r(6, 4, 3), padding=1),
    "transposed": lambda: F.conv_transpose2d(r(2, 4, 5, 6), r(4, 3, 3, 2), None, 2, 1, 1, 2, 2),
    "conv, channels last": lambda: F.conv2d(r(2, 4, 6, 6).to(memory_format=LAST), r(3, 4, 1, 1)),
    "batch norm": lambda: F.batch_norm(r(2, 3, 4, 4), r(3), r(3).abs(), r(3), r(3)),
    "batch norm, training": lambda: F.batch_norm(r(2, 3, 4), None, None, training=True),
    "batch norm, channels last": lambda: F.batch_norm(
        r(2, 3, 4, 4).to(memory_format=LAST), r(3), r(3).abs()
    ),
    "layer norm": lambda: F.layer_norm(r(2, 4, 3).transpose(1, 2), (4,), r(4), r(4)),
    "products": lambda: torch.baddbmm(r(3, 1), r(2, 3, 4), r(2, 4, 5)) @ r(5, 6) + r(6),
    "linear": lambda: F.linear(r(2, 3, 4), r(5, 4), r(5)),
    "mean": lambda: r(2, 3, 4).mean((0, -1)) + r(2, 5, 3).mean(1, keepdim=True)[1],
    "cat": lambda: torch.cat([r(2, 3, 4), r(2, 1, 4)], -2),
    "softmax": lambda: F.softmax(r(2, 3, 4), 1) + F.log_softmax(r(2, 3, 4), -1),
    "masked": lambda: r(2, 1, 4).masked_fill(r(3, 4) > 0, 0.0),
    "rolled": lambda: r(2, 5, 4).roll((1, 2), (0, 1)).view(2, 20),
    "attention": lambda: torch.ops.prune2deploy.attention(
        r(2, 5, 3, 4).transpose(1, 2), r(2, 3, 6, 4), r(2, 3, 6, 4), r(5, 6)
    ),
    "half": lambda: F.relu(r(2, 3).half()) + 1,
    "whole numbers": lambda: torch.arange(3) / torch.arange(1, 4) * 2,
}  # fmt: skip


class Compare(TorchDispatchMode):
    """Runs every operator and compares its results with what the table says of them."""

    def __init__(self):
        super().__init__()
        self.compared = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        found = KERNELS[func](*args, **kwargs) if func in KERNELS else None
        result = func(*args, **kwargs)
        if found is not None:
            made = [Form(tuple(t.shape), t.stride(), t.dtype) for t in tensors_in(result)]
            told = found if isinstance(found, list) else [found]
            assert [known(form) for form in told] == [known(form) for form in made], func
            self.compared += 1
        return result


def known(form):
    """A form without the strides of dimensions of size one, which mean nothing."""
    strides = tuple(s for s, n in zip(form.strides, form.shape, strict=True) if n != 1)
    return form.shape, strides, form.dtype


@pytest.mark.parametrize("name", CALLS)
def test_the_table_tells_what_operators_return(name):
    compare = Compare()
    with torch.no_grad(), compare:
        CALLS[name]()
    assert compare.compared or name in ("whole numbers", "conv, channels last")


@pytest.mark.parametrize(
    "call",
    [
        lambda x: F.conv2d(x, r(6, 3, 3, 3)),
        lambda x: F.conv2d(x, r(6, 4, 9, 9)),
        lambda x: F.conv2d(x, r(6, 4, 3, 3), r(5)),
        lambda x: F.batch_norm(x, r(3), r(3).abs()),
        lambda x: F.layer_norm(x, (7,)),
        lambda x: F.linear(x, r(5, 4)),
        lambda x: x + r(3, 1),
        lambda x: x.add_(r(2, 2, 4, 8, 8)),
        lambda x: torch.cat([x, r(2, 3, 8, 8)]),
        lambda x: x.view(2, 5, -1),
        lambda x: x.mean((4,)),
        lambda x: x.flatten(2) @ r(2, 63, 3),
        lambda x: x.masked_fill(r(3, 8) > 0, 0.0),
    ],
)
def test_what_does_not_fit_is_refused_on_shapes_too(call):
    x = r(2, 4, 8, 8)
    with pytest.raises((RuntimeError, IndexError)):
        call(x.clone())
    with pytest.raises((RuntimeError, IndexError, ValueError)), on_shapes(nn.Identity(), True):
        call(outlined(x))


class Net(nn.Module):
    """Convolutions and attention, with what the tests below put in between."""

    def __init__(self, between=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, 4)
        self.register_buffer("table", torch.arange(8.0))
        self.between = between or (lambda x: x)

    def forward(self, x):
        x = self.between(F.relu(self.norm(self.conv(x))))
        x = x.flatten(2).transpose(1, 2) + self.table
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x.mean(1))


def asked(model, x):
    """Look at a value first, so that the pass must run on values; it is the same for all inputs."""
    float((x * 0).sum())
    return model(x)


def described(graph, skip=0):
    steps = [
        (op.func, [tuple(node.size for node in dims) for dims in op.layouts])
        for op in graph.recording.operations[skip:]
    ]
    axes = [(axis.name, axis.size, axis.frozen) for axis in graph.axes]
    return steps, axes, [(block.name, block.weights) for block in graph.blocks]


def test_shapes_and_values_show_the_same():
    torch.manual_seed(0)
    model, x = Net().eval(), r(1, 3, 6, 6)
    on_shape, on_value = trace(model, x), trace(model, x, forward_fn=asked)
    assert on_shape.recording.on_shapes and not on_value.recording.on_shapes
    assert described(on_shape) == described(on_value, skip=3)
    plan = Plan({axis.name: tuple(range(axis.size // 2)) for axis in on_shape.prunable})
    pruned = [apply(model, graph, plan).eval() for graph in (on_shape, on_value)]
    torch.testing.assert_close(pruned[0](x), pruned[1](x))


@pytest.mark.parametrize(
    "between",
    [
        lambda x: x * 2 if x.mean() > -100 else x[:, :1],
        lambda x: x[:, x.amax((0, 2, 3)) >= 0],
        lambda x: x + torch.from_numpy(x.numpy()),
        lambda x: x + len(torch.nonzero(x > 100)),
        lambda x: torch.zeros(1, 8, 6, 6).copy_(x),
        lambda x: x * torch.tensor(x.tolist()),
    ],
    ids=["branch", "mask", "numpy", "nonzero", "written", "list"],
)
def test_code_that_looks_at_values_gets_values(between):
    graph = trace(Net(between).eval(), r(1, 3, 6, 6))
    assert not graph.recording.on_shapes
    assert {axis.name for axis in graph.axes} >= {"conv", "head"}


def test_code_that_catches_the_refusal_is_run_on_values():
    seen = []

    def between(x):
        try:
            seen.append(float(x.mean()))
        except NeedsValues:
            seen.append(None)
        return x if seen[-1] is not None else x * 3

    graph = trace(Net(between).eval(), r(1, 3, 6, 6))
    assert not graph.recording.on_shapes and seen[-1] is not None


def test_whole_numbers_tables_and_masks_keep_their_values():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.out = nn.Embedding(9, 6), nn.Linear(6, 2)

        def forward(self, tokens):
            mask = torch.ones_like(tokens, dtype=torch.bool).tril()
            if bool(mask.all()) or int(tokens.max()) > 8:
                raise AssertionError
            return self.out(self.words(tokens) * mask[..., None])

    graph = trace(Masked().eval(), torch.arange(12).reshape(4, 3) % 9)
    assert graph.recording.on_shapes


def test_no_outline_is_left_behind():
    model = Net()
    model.between = lambda x: setattr(model, "last", x) or x
    trace(model, r(1, 3, 6, 6))
    assert not any(isinstance(v, Outline) for m in model.modules() for v in vars(m).values())


def test_inputs_on_another_device_are_refused():
    with pytest.raises(TraceError, match="failed on inputs"):
        trace(Net().eval(), torch.empty(1, 3, 6, 6, device="meta"))


def test_an_outline_is_of_no_use_outside():
    x = outlined(r(2, 3))
    assert isinstance(x, Outline) and x.shape == (2, 3)
    with pytest.raises(NeedsValues):
        x + 1
    mode = OnShapes(nn.Identity())
    with mode:
        assert (x + 1).shape == (2, 3)
    assert not mode.failed


def test_a_copy_is_what_deepcopy_gives():
    model = nn.Sequential(Net(), nn.Linear(4, 4), nn.LSTM(4, 4))
    model[1].weight = nn.Parameter(model[1].weight.detach())
    model.tied, model.plain = model[1].weight, {"list": [1, {2}], "tensor": r(2), "self": model}
    nn.utils.parametrizations.weight_norm(model[0].head)
    calls = []
    model[1].register_forward_hook(lambda *_: calls.append(1))
    ours, theirs = copied(model, {}), copy.deepcopy(model)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name])
        assert tensor.data_ptr() != model.state_dict()[name].data_ptr()
    assert ours.tied is ours[1].weight and ours.plain["self"] is ours
    assert ours.plain["list"] == [1, {2}] and ours.plain["list"] is not model.plain["list"]
    assert ours[2]._flat_weights[0] is ours[2].weight_ih_l0
    assert [type(m) for m in ours.modules()][:2] == [type(m) for m in model.modules()][:2]
    ours[1](r(1, 4))
    assert calls == [1]
    ours[1].weight.data.zero_()
    assert model[1].weight.any()
