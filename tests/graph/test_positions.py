"""Dimensions whose positions mean something: they stay, and what merely passes does not."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

from .zeroed import zeroed

TOKENS = torch.randn(2, 5, 6)


class Net(nn.Module):
    """Two layers, something between."""

    def __init__(self, between, after=8, **parts):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(after, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self._between = between

    def forward(self, x):
        return self.last(self._between(self, self.first(x)))


class Scores(nn.Module):
    """Five scores of which something is told."""

    def __init__(self, told):
        super().__init__()
        self.first, self.scores, self._told = nn.Linear(6, 8), nn.Linear(8, 5), told

    def forward(self, x):
        return self._told(self.scores(self.first(x).relu()).sigmoid())


def halves(graph):
    return Plan({axis.name: tuple(range(1, axis.size, 2)) for axis in graph.prunable})


def assert_equal_without(model, example, kept):
    """Prune half of every axis; the layers named keep so many outputs, and results are equal."""
    model.eval()
    graph = trace(model, example)
    plan = halves(graph)
    before = zeroed(model, graph, plan)
    pruned = apply(before, graph, plan)
    shapes = graph.shapes(plan.counts)
    assert {name: shapes[name] for name in kept} == kept
    example = example if isinstance(example, tuple) else (example,)
    torch.testing.assert_close(pruned(*example), before(*example))
    return graph


FOUND = {
    "labels": lambda x: x.max(-1)[1],
    "scores and labels": lambda x: tuple(x.max(-1)),
    "least": lambda x: x.min(-1).indices,
    "middle": lambda x: x.median(-1).indices,
    "middle of numbers": lambda x: x.nanmedian(-1).indices,
    "first": lambda x: x.argmax(-1),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_is_found_by_number_keeps_its_positions(name):
    torch.manual_seed(0)
    graph = assert_equal_without(Scores(FOUND[name]), TOKENS, {"scores.weight": (5, 4)})
    assert graph["scores"].frozen == "positions are found by number"


@pytest.mark.parametrize("reduced", [lambda x: x.max(-1)[0], lambda x: x.amin(-1)])
def test_a_largest_value_alone_keeps_no_position(reduced):
    graph = trace(Scores(reduced).eval(), TOKENS)
    assert [axis.name for axis in graph.prunable] == ["first", "scores"]


def parameter(*shape):
    return nn.Parameter(torch.randn(*shape))


TRIANGLES = {
    "lower": lambda net, x: F.linear(x, net.w.tril()),
    "upper, above the diagonal": lambda net, x: F.linear(x, net.w.triu(2)) + x,
    "lower, in place": lambda net, x: F.linear(x, net.w.clone().tril_()),
}


@pytest.mark.parametrize("name", TRIANGLES)
def test_a_triangle_keeps_its_form(name):
    torch.manual_seed(0)
    model = Net(TRIANGLES[name], w=parameter(8, 8))
    graph = assert_equal_without(model, TOKENS, {"w": (8, 8)})
    assert graph["first"].frozen == "cut along a diagonal"


def test_a_triangle_over_the_same_channels_twice_may_lose_some():
    torch.manual_seed(0)
    model = Net(lambda net, x: x @ (x.transpose(1, 2) @ x).tril())
    assert_equal_without(model, TOKENS, {"first.weight": (4, 6)})


class Merged(nn.Module):
    """Writes rows of a second input over those of the first that a mask names."""

    def __init__(self, masked):
        super().__init__()
        self.words, self.pixels, self.last = nn.Linear(6, 8), nn.Linear(5, 8), nn.Linear(8, 3)
        self._masked = masked

    def forward(self, words, pixels, mask):
        words = self.words(words)
        return self.last(words.masked_scatter(self._masked(words, mask), self.pixels(pixels)))


MERGED = (torch.randn(1, 6, 6), torch.randn(2, 2, 5), torch.tensor([[1, 1, 0, 1, 1, 0]]) > 0)


@pytest.mark.parametrize(
    "masked",
    [lambda x, mask: mask[..., None], lambda x, mask: mask[..., None].expand_as(x)],
    ids=["broadcast", "expanded"],
)
def test_rows_that_a_mask_fills_share_their_channels_whatever_the_batch(masked):
    torch.manual_seed(0)
    kept = {"words.weight": (4, 6), "pixels.weight": (4, 5)}
    assert_equal_without(Merged(masked), MERGED, kept)


def test_single_elements_that_a_mask_fills_stay_in_order():
    torch.manual_seed(0)
    model = Merged(lambda x, mask: (x > 0) & mask[..., None])
    graph = assert_equal_without(model, MERGED, {"words.weight": (8, 6), "pixels.weight": (8, 5)})
    assert graph["words"].frozen == graph["pixels"].frozen == "filled in order"


def remembered(net, x):
    k, v = (part(net.memory).expand(2, -1, -1) for part in (net.k, net.v))
    return F.scaled_dot_product_attention(x, k, v, scale=0.3)


def test_keys_that_share_a_softmax_stay():
    torch.manual_seed(0)
    parts = {"k": nn.Linear(6, 8), "v": nn.Linear(6, 8), "memory": parameter(12, 6)}
    model = Net(remembered, **parts)
    kept = {"memory": (12, 3), "k.weight": (4, 3), "v.weight": (4, 3)}
    graph = assert_equal_without(model, TOKENS, kept)
    (slots,) = (axis for axis in graph.axes if axis.size == 12)
    assert slots.frozen == "categories of a softmax"


class Bags(nn.Module):
    """Words summed up, bag by bag."""

    def __init__(self, **options):
        super().__init__()
        self.table, self.last = nn.EmbeddingBag(20, 8, **options), nn.Linear(8, 3)

    def forward(self, *words):
        return self.last(self.table(*words))


BAGS = {
    "sum": ({"mode": "sum"}, (torch.randint(0, 20, (2, 5)),)),
    "mean": ({"mode": "mean"}, (torch.randint(0, 20, (7,)), torch.tensor([0, 3]))),
    "max": ({"mode": "max", "padding_idx": 3}, (torch.randint(0, 20, (2, 5)),)),
    "weighed": (
        {"mode": "sum", "include_last_offset": True},
        (torch.randint(0, 20, (7,)), torch.tensor([0, 3, 7]), torch.rand(7)),
    ),
}


@pytest.mark.parametrize("name", BAGS)
def test_bags_of_words_keep_their_words_and_lose_width(name):
    torch.manual_seed(0)
    options, example = BAGS[name]
    model = Bags(**options)
    graph = assert_equal_without(model, example, {"table.weight": (20, 4)})
    assert not graph.unknown
    captured = capture(copy.deepcopy(model), model, graph, Plan({}))
    torch.testing.assert_close(captured(*example), model(*example))
    captured(*example).sum().backward()
    assert captured.table.weight.grad is not None


class Deformed(nn.Module):
    """A convolution that reads where another one says."""

    def __init__(self, places=1, groups=1):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(12, 2, 1)
        self.where = nn.Conv2d(3, places * 18, 3, padding=1)
        self.strength = nn.Conv2d(3, places * 9, 3, padding=1)
        convolution = pytest.importorskip("torchvision").ops.DeformConv2d
        self.deformed = convolution(16, 12, 3, padding=1, groups=groups)

    def forward(self, x):
        mask = self.strength(x).sigmoid()
        return self.last(self.deformed(self.first(x), self.where(x), mask))


DEFORMED = {
    "plain": ((1, 1), {"first.weight": (8, 3, 1, 1), "deformed.weight": (6, 8, 3, 3)}),
    "groups": ((1, 4), {"first.weight": (4, 3, 1, 1), "deformed.weight": (2, 2, 3, 3)}),
    "places": ((2, 1), {"first.weight": (8, 3, 1, 1), "deformed.weight": (6, 8, 3, 3)}),
}


@pytest.mark.parametrize("name", DEFORMED)
def test_deformed_convolutions_lose_channels_and_keep_where_they_read(name):
    torch.manual_seed(0)
    options, kept = DEFORMED[name]
    model, x = Deformed(*options), torch.randn(2, 3, 6, 6)
    graph = assert_equal_without(model, x, kept | {"where.weight": (18 * options[0], 3, 3, 3)})
    assert not graph.unknown
    assert graph["where"].frozen == graph["strength"].frozen == "positions to read at"
    assert graph.macs() == counted_macs(model, x)


def counted_macs(model, x):
    rows = {name: layer.weight for name, layer in model.named_children()}
    return sum(x.shape[0] * 6 * 6 * weight.numel() for weight in rows.values())
