"""Products of matrices and vectors lose channels on every side that has some."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.graph import trace
from prune2deploy.surgery.slicing import apply

from .test_oracles import random_plan
from .zeroed import zeroed


class Product(nn.Module):
    """Two linear layers, a product of what they make and of parameters, a linear layer."""

    def __init__(self, product, made, **stored):
        super().__init__()
        self.left, self.right = nn.Linear(5, 8), nn.Linear(5, 6)
        self.last = nn.Linear(made, 2)
        for name, part in stored.items():
            setattr(self, name, part)
        self._product = product

    def forward(self, x):
        return self.last(self._product(self, self.left(x), self.right(x)))


def free(*shape):
    return nn.Parameter(torch.randn(shape))


PRODUCTS = {
    "bilinear": lambda: (
        Product(lambda n, a, b: n.mix(a, b), 10, mix=nn.Bilinear(8, 6, 10)),
        torch.randn(3, 5),
    ),
    "bilinear over several dimensions": lambda: (
        Product(lambda n, a, b: n.mix(a, b), 10, mix=nn.Bilinear(8, 6, 10, bias=False)),
        torch.randn(3, 4, 5),
    ),
    "matrix plus outer product": lambda: (
        Product(
            lambda n, a, b: b + a @ torch.addr(n.matrix, n.rows, n.columns),
            6,
            matrix=free(8, 6),
            rows=free(8),
            columns=free(6),
        ),
        torch.randn(3, 5),
    ),
    "sparse matrix": lambda: (
        Product(
            lambda n, a, b: torch.sparse.mm(n.graph, a @ n.matrix) + n.graph @ b,
            6,
            graph=nn.Buffer(torch.rand(3, 3).to_sparse()),
            matrix=free(8, 6),
        ),
        torch.randn(3, 5),
    ),
    "diagonals": lambda: (
        Product(
            lambda n, a, b: (
                a @ torch.diag(n.scale) @ n.matrix
                + b * n.square.diagonal()
                + torch.einsum("bc,cc->bc", b, n.square)
            ),
            6,
            scale=free(8),
            matrix=free(8, 6),
            square=free(6, 6),
        ),
        torch.randn(3, 5),
    ),
    "sum of matrix products": lambda: (
        Product(
            lambda n, a, b: torch.addbmm(n.bias, a, n.matrix) + b,
            6,
            bias=free(6),
            matrix=free(3, 8, 6),
        ),
        torch.randn(3, 4, 5),
    ),
}


@pytest.mark.parametrize("name", PRODUCTS)
def test_a_product_without_channels_is_the_one_in_which_they_are_zero(name):
    torch.manual_seed(0)
    model, x = PRODUCTS[name]()
    graph = trace(model, x)
    assert not graph.unknown
    assert {axis.frozen for axis in graph.axes} == {None, "model input", "model output"}
    plan = random_plan(graph, 0)
    pruned = apply(model, graph, plan)
    torch.testing.assert_close(pruned(x), zeroed(model, graph, plan)(x))


def test_widths_of_a_bilinear_layer_follow():
    model, x = PRODUCTS["bilinear"]()
    graph = trace(model, x)
    pruned = apply(model, graph, random_plan(graph, 0))
    mix = pruned.mix
    assert tuple(mix.weight.shape) == (mix.out_features, mix.in1_features, mix.in2_features)
    (layer,) = (layer for layer in graph.layers if layer.weight == "mix.weight")
    assert layer.macs(graph.sizes({})) == 3 * 10 * 8 * 6


class Asking(nn.Module):
    """Learnt queries of a sequence, each of which sees what comes before it."""

    def __init__(self, causal):
        super().__init__()
        self.queries, self.causal = free(6, 8), causal
        self.keys, self.last = nn.Linear(5, 8), nn.Linear(8 * 6, 2)

    def forward(self, x):
        keys, queries = self.keys(x), self.queries.expand(len(x), -1, -1)
        found = F.scaled_dot_product_attention(queries, keys, keys, is_causal=self.causal)
        return self.last(found.flatten(1))


@pytest.mark.parametrize(("causal", "reason"), [(False, None), (True, "its order matters")])
def test_queries_that_see_what_comes_before_them_stay(causal, reason):
    graph = trace(Asking(causal), torch.randn(3, 6, 5))
    assert {axis.frozen for axis in graph.axes if axis.size == 6} == {reason}
