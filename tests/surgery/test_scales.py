"""Attention keeps the scale of its softmax when heads lose channels."""

import copy

import numpy as np
import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.pruning.live import Live
from prune2deploy.recover.reconstruct import reconstruct
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.scales import factors
from prune2deploy.surgery.slicing import apply
from prune2deploy.surgery.widths import Widths

from ..graph.zeroed import zeroed

X = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).double()


def turned(t):
    half = t.shape[-1] // 2
    return torch.cat([-t[..., half:], t[..., :half]], -1)


class Heads(nn.Module):
    """Two heads of width eight from what ``made`` gives; ``more`` reads that too."""

    def __init__(self, made, more=lambda net, q, k, v: 0, **parts):
        super().__init__()
        self.enter, self.leave = nn.Linear(6, 16), nn.Linear(16, 3)
        self.made, self.more = made, more
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        q, k, v = self.made(self, self.enter(x))
        y = F.scaled_dot_product_attention(q, k, v) + self.more(self, q, k, v)
        return self.leave(y.transpose(1, 2).flatten(2))


def heads(x):
    return x.unflatten(-1, (2, -1)).transpose(1, 2)


def linear(out=16):
    return nn.Linear(16, out)


def apart(net, x):
    return heads(net.q(x)), heads(net.k(x)), heads(net.v(x))


def three(**parts):
    return {name: linear() for name in "qkv"} | parts


def rotated(net, x):
    q, k, v = apart(net, x)
    return q * net.cos + turned(q) * net.sin, k * net.cos + turned(k) * net.sin, v


def complex_rotated(net, x):
    q, k, v = apart(net, x)
    turn = torch.polar(torch.ones(5, 1), torch.arange(5.0)[:, None]).to(torch.complex128)
    q, k = (
        torch.view_as_real(torch.view_as_complex(t.unflatten(-1, (-1, 2))) * turn).flatten(-2)
        for t in (q, k)
    )
    return q, k, v


KEPT = {
    "strides that torch has no kernel for": lambda: Heads(
        lambda n, x: [heads(f(x.mT).mT) for f in (n.q, n.k, n.v)],
        **{name: nn.Conv1d(16, 16, 1) for name in "qkv"},
    ),
    "one projection": lambda: Heads(
        lambda n, x: n.qkv(x).unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4).unbind(0),
        qkv=linear(48),
    ),
    "chunks": lambda: Heads(lambda n, x: map(heads, n.qkv(x).chunk(3, -1)), qkv=linear(48)),
    "three projections": lambda: Heads(apart, **three()),
    "no bias": lambda: Heads(apart, **three(q=nn.Linear(16, 16, bias=False))),
    "convolution": lambda: Heads(
        lambda n, x: [heads(f(x.mT).mT.contiguous()) for f in (n.q, n.k, n.v)],
        **{name: nn.Conv1d(16, 16, 1) for name in "qkv"},
    ),
    "rotated": lambda: Heads(
        rotated, **three(cos=nn.Buffer(torch.rand(5, 1)), sin=nn.Buffer(torch.rand(5, 1)))
    ),
    "rotated as complex numbers": lambda: Heads(complex_rotated, **three()),
    "queries that others read": lambda: Heads(apart, lambda n, q, k, v: q.relu(), **three()),
    "learnt queries": lambda: Heads(
        lambda n, x: (n.rows.expand(2, -1, -1, -1), heads(n.k(x)), heads(n.v(x))),
        k=linear(), v=linear(), rows=nn.Parameter(torch.randn(1, 2, 5, 8)),
    ),
    "biases of positions": lambda: Heads(
        lambda n, x: [t + bias for t, bias in zip(apart(n, x), (n.at, 0, 0), strict=True)],
        **three(at=nn.Parameter(torch.randn(5, 8))),
    ),
    "two calls": lambda: Heads(
        apart, lambda n, q, k, v: F.scaled_dot_product_attention(q, k.roll(1, 2), v), **three()
    ),
    "computed weight": lambda: Heads(apart, **three(q=parametrizations.weight_norm(linear()))),
}  # fmt: skip
SPELT = {
    "queries and keys that others read": lambda: Heads(
        apart, lambda n, q, k, v: q.relu() + k.sigmoid(), **three()
    ),
    "queries are keys": lambda: Heads(
        lambda n, x: [heads(n.q(x))] * 2 + [heads(n.v(x))], **three()
    ),
    "one weight for both": lambda: Heads(
        lambda n, x: (heads(F.linear(x, n.w)), heads(F.linear(x, n.w * 2)), heads(n.v(x))),
        v=linear(), w=nn.Parameter(torch.randn(16, 16)),
    ),
    "other functions between": lambda: Heads(
        lambda n, x: (heads(n.q(x).relu()), heads(n.k(x).sigmoid()), heads(n.v(x))), **three()
    ),
    "scaled by the code": lambda: Heads(
        apart,
        lambda n, q, k, v: (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v,
        **three(),
    ),
    "changed in place": lambda: Heads(
        lambda n, x: (heads(n.q(x)).add_(1.0), heads(n.k(x)).add_(1.0), heads(n.v(x))), **three()
    ),
}  # fmt: skip


def strong(make):
    """A network whose softmax is far from even."""
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith("original1"):  # a direction
                parameter.mul_(2)
    return model


def narrow(graph):
    """Half of the channels of each head."""
    sizes = {4: 2, 8: 4}
    return Plan(
        {a.name: tuple(range(a.size))[-sizes[a.size] :] for a in graph.prunable if a.size in sizes}
    )


def emptied(model, graph, plan):
    """The model with zeros in what the plan removes, but for directions, which cannot be zero."""
    return zeroed(model, graph, plan, lambda member: not member.tensor.endswith("original1"))


def both_forms(make, x):
    """A network with zeros in what its plan removes, pruned as it is and as captured operators."""
    model = strong(make)
    graph = trace(model, x)
    plan = narrow(graph)
    model = emptied(model, graph, plan)
    pruned = apply(model, graph, plan)
    again = capture(copy.deepcopy(pruned), model, graph, plan)
    for found in (pruned, again):
        torch.testing.assert_close(found(x), model(x), rtol=1e-9, atol=1e-9)
    return pruned


@pytest.mark.parametrize("name", KEPT)
def test_parameters_keep_the_scale_where_they_can(name):
    pruned = both_forms(KEPT[name], X)
    assert type(pruned) is Heads
    assert pruned.leave.in_features < 16


@pytest.mark.parametrize("name", SPELT)
def test_the_scale_is_spelt_out_where_no_parameter_can_keep_it(name):
    assert isinstance(both_forms(SPELT[name], X), fx.GraphModule)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.TransformerEncoderLayer(16, 2, 24, batch_first=True),
        lambda: nn.Transformer(16, 2, 1, 1, 24, batch_first=True),
        lambda: nn.TransformerDecoderLayer(16, 2, 24, batch_first=True),
    ],
    ids=["encoder layer", "transformer", "decoder layer"],
)
def test_layers_of_torch_keep_it(make):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.enter, self.body = nn.Linear(6, 16), make()

        def forward(self, x):
            x = self.enter(x)
            one = isinstance(self.body, nn.TransformerEncoderLayer)
            return self.body(x) if one else self.body(x, x.flip(1))

    both_forms(Whole, X)


def test_only_rows_of_queries_are_multiplied():
    model = strong(KEPT["one projection"])
    graph = trace(model, X)
    plan = narrow(graph)
    found = factors(graph.recording, Widths(graph, Plan({})), Widths(graph, plan))
    assert set(found) == {"qkv.weight", "qkv.bias"}
    wanted = torch.tensor([0.5**0.5] * 16 + [1.0] * 32, dtype=torch.float64)
    for factor in found.values():
        assert torch.equal(factor.flatten(), wanted)


class ByHand(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))

    def forward(self, x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-12) * self.weight


NORMS = {"a module": lambda: nn.RMSNorm(8, eps=1e-12), "by hand": ByHand}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("sides", ["q", "k", "qk"])
def test_what_was_divided_by_the_root_of_a_mean_counts(norm, sides):
    """Fewer channels make shorter queries: as much as the scale would, for one side of the two."""

    def made(net, x):
        q, k, v = apart(net, x)
        q = net.of_q(q) if "q" in sides else q
        return q, net.of_k(k) if "k" in sides else k, v

    parts = {f"of_{side}": NORMS[norm]() for side in sides}
    model = strong(lambda: Heads(made, **three(**parts)))
    graph = trace(model, X)
    plan = narrow(graph)
    wanted = emptied(model, graph, plan)
    pruned = apply(wanted, graph, plan)
    assert type(pruned) is Heads
    torch.testing.assert_close(pruned(X), wanted(X), rtol=1e-7, atol=1e-7)


@pytest.mark.filterwarnings("ignore:the code of Heads")
@pytest.mark.parametrize("name", ["one projection", "queries and keys that others read"])
def test_models_that_are_pruned_in_place_keep_it_each_time(name):
    model = strong((KEPT | SPELT)[name])
    graph = trace(model, X)
    wanted = emptied(model, graph, narrow(graph))
    live = Live(copy.deepcopy(wanted), X, None)
    for channels in ([0, 3], [0, 1]):  # of those that are left
        axes = [axis.name for axis in live.graph.prunable if axis.size in (8, 6)]
        live.remove({axis: np.array(channels) for axis in axes})
        torch.testing.assert_close(live.model(X), wanted(X), rtol=1e-9, atol=1e-9)


def test_reconstruction_wants_of_queries_what_they_are_to_be():
    model = strong(KEPT["three projections"]).float()
    x = torch.randn(64, 5, 6)
    graph = trace(model, x[:2])
    plan = narrow(graph)
    model = emptied(model, graph, plan)
    pruned = apply(model, graph, plan)
    assert reconstruct(pruned, model, graph, plan, [((x,), None)]).of == 0
    torch.testing.assert_close(pruned(x), model(x))
