"""Penalties against sums done by hand, on a network whose axes are written out here."""

import numpy as np
import pytest
import torch
from torch import nn

from prune2deploy.graph.axes import Axis, Graph, Member
from prune2deploy.recover.sparse import (
    Growing,
    bn_scale,
    channel_sizes,
    channel_squares,
    group_lasso,
)


def member(tensor, dim, role, channels):
    return Member(tensor, dim, role, np.asarray(channels, np.int64))


@pytest.fixture
def pair():
    """Linear 2 -> 4 with BatchNorm -> 3; the 4 are two channels twice, as a reshape makes them."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    nn.init.normal_(module[1].weight)
    twice = [0, 1, 0, 1]
    middle = Axis(
        "middle",
        2,
        (
            member("0.weight", 0, "out", twice),
            member("0.bias", 0, "out", twice),
            member("1.weight", 0, "param", twice),
            member("1.bias", 0, "param", twice),
            member("1.running_mean", 0, "param", twice),
            member("2.weight", 1, "in", [0, 1, -1, 1]),
        ),
    )
    fixed = Axis("out", 3, (member("2.weight", 0, "out", [0, 1, 2]),), frozen="an output")
    graph = Graph((middle, fixed), (), {}, frozenset(), (), {})
    return module, graph


def by_hand(module):
    w, b = module[0].weight, module[0].bias
    n, m, v = module[1].weight, module[1].bias, module[2].weight
    one = [sum((t[i] ** 2).sum() for t in (w, b, n, m) for i in (c, c + 2)) for c in (0, 1)]
    one[0] = one[0] + (v[:, 0] ** 2).sum()
    one[1] = one[1] + (v[:, 1] ** 2).sum() + (v[:, 3] ** 2).sum()
    return torch.stack(one)


def test_squares_and_sizes(pair):
    module, graph = pair
    torch.testing.assert_close(channel_squares(module, graph["middle"]), by_hand(module))
    sizes = channel_sizes(module, graph["middle"])
    assert sizes.tolist() == [2 * (2 + 1 + 1 + 1) + 3, 2 * (2 + 1 + 1 + 1) + 6]


def test_group_lasso_is_by_hand_and_leaves_frozen_axes_out(pair):
    module, graph = pair
    expected = (torch.tensor([13.0, 16.0]).sqrt() * by_hand(module).sqrt()).sum()
    torch.testing.assert_close(group_lasso(module, graph), expected)


def test_group_lasso_has_a_finite_gradient_at_zero(pair):
    module, graph = pair
    with torch.no_grad():
        for weight in module.parameters():
            weight.zero_()
    group_lasso(module, graph).backward()
    gradients = [w.grad for w in module.parameters() if w.grad is not None]
    assert len(gradients) == 5 and all(torch.isfinite(g).all() for g in gradients)


def test_bn_scale(pair):
    module, graph = pair
    torch.testing.assert_close(bn_scale(module, graph), module[1].weight.abs().sum())


def test_growing_strengthens_only_what_goes_and_stops_at_its_ceiling(pair):
    module, graph = pair
    penalty = Growing.start(graph, ceiling=0.25)
    assert float(penalty(module)) == 0
    grown = penalty.grown({"middle": (1,)}, 0.1)
    torch.testing.assert_close(grown(module), 0.05 * by_hand(module)[0])
    for _ in range(9):
        grown = grown.grown({"middle": (1,)}, 0.1)
    assert grown.strengths["middle"].tolist() == [0.25, 0.0]
    assert penalty.strengths["middle"].tolist() == [0.0, 0.0]


def test_training_with_growing_drives_the_channel_to_zero(pair):
    module, graph = pair
    penalty = Growing.start(graph)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3)
    for _ in range(60):
        penalty = penalty.grown({"middle": (1,)}, 0.05)
        optimizer.zero_grad()
        penalty(module).backward()
        optimizer.step()
    squares = channel_squares(module, graph["middle"])
    assert squares[0] < 1e-6 < squares[1]
