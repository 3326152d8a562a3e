"""Numbers in attributes that are widths follow these, and the code of the model stays its own."""

import copy

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

from ..graph.zeroed import zeroed


class Attention(nn.Module):
    """Keys that queries share, and every size in an attribute, as transformers have it."""

    def __init__(self, fused):
        super().__init__()
        self.head_dim, self.groups, self.fused, self.scale = 8, 6, fused, 8**-0.5
        self.parts = [32, 32]
        self.q, self.kv, self.out = nn.Linear(12, 192), nn.Linear(12, 64), nn.Linear(192, 12)

    def forward(self, x):
        q = self.q(x).view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
        k, v = (
            part.view(*x.shape[:2], -1, self.head_dim).transpose(1, 2)
            for part in self.kv(x).split(self.parts, -1)
        )
        k, v = (part.repeat_interleave(self.groups, 1) for part in (k, v))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
        else:
            y = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
        return self.out(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.first, self.parts = nn.Linear(5, 12), nn.Sequential(*parts)
        self.last = nn.Linear(12, 3)

    def forward(self, x):
        return self.last(self.parts(self.first(x)))


X = torch.randn(2, 7, 5)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    ("sizes", "left"), [((4, 6), (8, 3)), ((8,), (4, 6)), ((4, 6, 8, 12), (4, 3))]
)
def test_sizes_of_heads_follow_and_the_code_stays(fused, sizes, left):
    torch.manual_seed(0)
    model = Model(Attention(fused)).eval()
    graph = trace(model, X)
    plan = Plan({a.name: range(a.size // 2) for a in graph.prunable if a.size in sizes})
    pruned = apply(model, graph, plan)
    assert type(pruned) is Model
    attention = pruned.parts[0]
    assert (attention.head_dim, attention.groups) == left
    assert sum(attention.parts) == attention.kv.out_features
    assert model.parts[0].parts == [32, 32] and model.parts[0].head_dim == 8
    captured = capture(copy.deepcopy(pruned), model, graph, plan).eval()
    torch.testing.assert_close(pruned(X), captured(X))
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))
    assert pruned(torch.randn(3, 9, 5)).shape == (3, 9, 3)  # other lengths than the example's


class Powers(nn.Module):
    """The number of channels in an attribute, which something else is computed from too."""

    def __init__(self):
        super().__init__()
        self.width = 12

    def forward(self, x):
        return (x.flatten().view(-1, self.width) / self.width).view(*x.shape[:2], -1)


def test_a_number_that_is_computed_with_stays():
    torch.manual_seed(0)
    model = Model(Powers()).eval()
    graph = trace(model, X)
    plan = Plan({"first": (0, 2, 3, 7)})
    pruned = apply(model, graph, plan)
    assert isinstance(pruned, fx.GraphModule)
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))


def test_standard_layers_keep_what_is_no_width():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 4, padding=2, padding_mode="circular"),
        nn.Flatten(), nn.Linear(4 * 49, 8), nn.Unflatten(1, (8, 1)), nn.Conv1d(8, 2, 1),
    ).eval()  # fmt: skip
    x = torch.randn(2, 3, 6, 6)
    graph = trace(model, x)
    pruned = apply(model, graph, Plan({"0": (0, 3), "3": (1, 2, 5)}))
    assert not isinstance(pruned, fx.GraphModule)
    assert (pruned[1].in_channels, pruned[1].kernel_size) == (2, (4, 4))
    assert pruned[4].unflattened_size == (3, 1)
    torch.testing.assert_close(
        pruned(x), zeroed(model, graph, Plan({"0": (0, 3), "3": (1, 2, 5)}))(x)
    )


class Parts(nn.Module):
    """A part and what is left, both computed from the width of the whole."""

    def __init__(self):
        super().__init__()
        self.width, self.part = 12, 4
        self.own = nn.Linear(4, 4)

    def forward(self, x):
        a, b = x.split([self.part, self.width - self.part], -1)
        return torch.cat([self.own(a), b], -1)


class Halves(nn.Module):
    def __init__(self):
        super().__init__()
        self.width, self.wide = 12, nn.Linear(12, 12)

    def forward(self, x):
        x = self.wide(x)
        return torch.cat([x[..., self.width // 2 :], x[..., : self.width // 2].tanh()], -1)


class Blur(nn.Module):
    """A fixed kernel for each channel, as many as an attribute says."""

    def __init__(self):
        super().__init__()
        self.channels = 12
        self.register_buffer("kernel", torch.rand(12, 1, 3))

    def forward(self, x):
        return F.conv1d(x.transpose(1, 2), self.kernel, groups=self.channels).transpose(1, 2)


class Projection(nn.Module):
    """A layer of its own, as wide as what it is given, with another width inside."""

    def __init__(self):
        super().__init__()
        self.made, self.weight = 12, nn.Parameter(torch.randn(12, 12))

    def forward(self, x):
        y = torch.mm(x.reshape(-1, x.shape[-1]), self.weight)
        return y.view(*x.shape[:-1], self.made)


@pytest.mark.parametrize("kind", [Parts, Halves, Blur, Projection])
def test_what_code_computes_from_an_attribute_follows(kind):
    torch.manual_seed(0)
    model = Model(kind(), nn.Linear(12, 12)).eval()
    graph = trace(model, X)
    left = [
        axis.size - (2 if axis.tie is not None else 1 + place % 2)
        for place, axis in enumerate(graph.prunable)
    ]  # widths that were alike differ now
    plan = Plan({axis.name: range(n) for axis, n in zip(graph.prunable, left, strict=True)})
    pruned = apply(model, graph, plan)
    assert type(pruned) is Model
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))
    assert pruned(torch.randn(3, 9, 5)).shape[0] == 3


class Elsewhere(nn.Module):
    """An attribute that is a width in one place, and another number in another."""

    def __init__(self, use):
        super().__init__()
        self.heads, self.use = 4, use

    def forward(self, x):
        x = x.unflatten(-1, (self.heads, -1)).tanh().flatten(2)
        return self.use(x, self.heads)


USES = {
    "position": lambda x, n: x * x[:, n].unsqueeze(1),
    "steps": lambda x, n: x + x.roll(n, 1),
    "place": lambda x, n: x + x.kthvalue(n, 1, keepdim=True)[0],
    "diagonal": lambda x, n: x + (x @ x.transpose(1, 2)).tril(n - 5).sum(2, keepdim=True),
    "value": lambda x, n: x + x.new_full((7, 1), n),
    "numbers": lambda x, n: x + torch.arange(n, n + 7).unsqueeze(1),
    "border": lambda x, n: x + F.pad(x[..., :1, :], (0, 0, n, 6 - n)),
    "choice": lambda x, n: [x, x.cos(), x.tanh(), x.exp(), x.sin()][n] + x,
    "range": lambda x, n: x + x.sum(2).repeat(1, 2)[:, n : n + 7].unsqueeze(2),
}  # fmt: skip


@pytest.mark.parametrize("use", USES)
def test_a_width_that_is_another_number_elsewhere_stays_that_there(use):
    torch.manual_seed(0)
    model = Model(Elsewhere(USES[use])).eval()
    graph = trace(model, X)
    assert graph.recording.on_shapes
    plan = Plan({axis.name: (0, 1, 3) for axis in graph.prunable if axis.size == 4})
    assert plan.kept
    pruned = apply(model, graph, plan)
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))
