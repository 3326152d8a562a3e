"""What a sliced copy is checked against: operators, shapes, and numbers that are widths."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.slicing import apply

from ..graph.zeroed import zeroed

X = torch.randn(2, 3, 6, 6)


class Through(nn.Module):
    """A convolution to sixteen channels, something in the middle, a convolution."""

    def __init__(self, middle, after=16):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(after, 2, 1)
        self.shuffle = nn.ChannelShuffle(4)
        self._middle = middle

    def forward(self, x):
        return self.last(self._middle(self, self.first(x)))


def from_the_end(net, x):
    """Channels four to seven, counted from the end."""
    return x[:, -12:-8]


def by_half(net, x):
    half = x.shape[1] // 2
    return x[:, half:] * x[:, :half]


CASES = {
    "shuffle module": (lambda net, x: net.shuffle(x), 16, Through),
    "shuffle by a constant": (lambda net, x: F.channel_shuffle(x, 4), 16, torch.fx.GraphModule),
    "slice by constants": (lambda net, x: x[:, 4:8], 4, torch.fx.GraphModule),
    "slice from the end": (from_the_end, 4, torch.fx.GraphModule),
    "steps from the end": (lambda net, x: x[:, -15::2], 8, torch.fx.GraphModule),
    "steps": (lambda net, x: x[:, 1::2], 8, Through),
    "slice by widths": (by_half, 8, Through),
}


@pytest.mark.parametrize("name", CASES)
def test_numbers_that_constants_in_the_code_left_as_they_were_are_found_out(name):
    torch.manual_seed(0)
    middle, after, kind = CASES[name]
    model = Through(middle, after).eval()
    graph = trace(model, X)
    plan = Plan({axis.name: tuple(range(1, axis.size, 2)) for axis in graph.prunable})
    assert graph.shapes(plan.counts)["first.weight"][0] <= 8
    before = zeroed(model, graph, plan)
    pruned = apply(before, graph, plan)
    assert type(pruned).__name__ == "Through" and isinstance(pruned, kind)
    torch.testing.assert_close(pruned(X), before(X))


def test_a_shuffle_module_follows_the_groups_that_are_left():
    model = Through(lambda net, x: net.shuffle(x)).eval()
    graph = trace(model, X)
    groups, within = (axis for axis in graph.prunable if axis.size == 4)
    plan = Plan({groups.name: (1, 3), within.name: (0, 1, 2)})
    pruned = apply(model, graph, plan)
    assert (pruned.first.out_channels, pruned.shuffle.groups) == (6, 2)


LIKE = {
    "zeros": torch.zeros_like,
    "ones": torch.ones_like,
    "empty": torch.empty_like,
    "noise": torch.randn_like,
    "full": lambda x: torch.full_like(x, 2.0),
}


@pytest.mark.parametrize("name", LIKE)
@pytest.mark.parametrize("on_values", [False, True])
def test_tensors_that_are_made_like_others_are_no_reason_to_capture(name, on_values):
    def middle(net, x):
        return x + LIKE[name](x).clamp(0, 1) * bool(on_values and x.sum() < 1e9)

    model = Through(middle).eval()
    graph = trace(model, X)
    assert graph.recording.on_shapes is not on_values
    for plan in (Plan({}), Plan({"first": (1, 2, 9)})):
        pruned = apply(model, graph, plan)
        assert type(pruned) is Through and pruned(X).shape == (2, 2, 6, 6)


FROM_A_WIDTH = {
    "number": lambda x: x / x.shape[1] ** 0.5,
    "tensor": lambda x: x / torch.sqrt(torch.tensor(x.shape[1], dtype=x.dtype)),
    "tensor like another": lambda x: x * x.new_tensor([x.shape[1], 1.0]).mean(),
    "tensor of one number": lambda x: x / torch.full((), float(x.shape[1])),
}


@pytest.mark.parametrize("name", FROM_A_WIDTH)
def test_what_code_computes_from_a_width_stays_what_it_was(name):
    model = Through(lambda net, x: FROM_A_WIDTH[name](x)).eval()
    graph = trace(model, X)
    plan = Plan({"first": (1, 2, 9)})
    pruned = apply(model, graph, plan)
    assert isinstance(pruned, torch.fx.GraphModule)
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))


def merged(net, x):
    """Heads are moved, and copied for that unless there is one."""
    heads = x.flatten(2).unflatten(1, (net.heads, -1))
    return heads.transpose(1, 2).reshape(x.shape[0], -1, *x.shape[2:])


def written_after(net, x):
    """What is written to lies in the memory of what is read, unless that was copied."""
    y = merged(net, x)
    y.add_(1)
    return y * x.sum()


class Heads(nn.Module):
    def __init__(self, middle):
        super().__init__()
        self.heads = 2
        self.first, self.last = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1)
        self._middle = middle

    def forward(self, x):
        return self.last(self._middle(self, self.first(x)))


@pytest.mark.parametrize(
    ("middle", "kind"), [(merged, Heads), (written_after, torch.fx.GraphModule)]
)
def test_copies_that_one_head_does_not_take_are_no_difference_unless_written_to(middle, kind):
    torch.manual_seed(0)
    model = Heads(middle).eval()
    graph = trace(model, X)
    heads, within = (axis for axis in graph.prunable if axis.size in (2, 8))
    plan = Plan({heads.name: (1,), within.name: (0, 1, 3)})
    pruned = apply(model, graph, plan)
    assert isinstance(pruned, kind)
    torch.testing.assert_close(pruned(X), zeroed(model, graph, plan)(X))
