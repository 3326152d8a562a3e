"""The work of building and pruning grows with the operators, never faster. Counted, not timed."""

import sys
import warnings

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp

from .nets import Attention, Block
from .test_complaints import MAGNITUDE, Shuffle

PIXELS, TOKENS = torch.randn(1, 3, 8, 8), torch.randn(1, 3, 6)


class Added(nn.Module):
    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return x + self.part(x)


def residual(depth):
    blocks = [Block(8) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 2, 1)), PIXELS


def shuffled(depth):
    blocks = [nn.Sequential(nn.Conv2d(8, 8, 1), Shuffle()) for _ in range(depth)]
    return nn.Sequential(nn.Conv2d(3, 8, 1), *blocks, nn.Conv2d(8, 2, 1)), PIXELS


def attending(depth):
    blocks = [Added(Attention(16, 4)) for _ in range(depth)]
    return nn.Sequential(nn.Linear(6, 16), *blocks, nn.Linear(16, 2)), TOKENS


def calls(work):
    """Function calls that some work makes, Python's and those of extensions."""
    count = 0

    def seen(frame, event, argument):
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


def build(model, x):
    tp.DependencyGraph().build_dependency(model, x)


def prune(model, x):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a replaced forward
        tp.pruner.BasePruner(model, x, importance=MAGNITUDE).step()


@pytest.mark.parametrize("network", [residual, shuffled, attending])
@pytest.mark.parametrize("work", [build, prune])
def test_work_is_linear_in_the_operators(network, work):
    work(*network(2))  # what is imported and remembered once
    few, some, many = (calls(lambda n=n: work(*network(n))) for n in (8, 16, 32))
    growth = (many - some) / (some - few)
    assert growth < 2.6, (few, some, many)  # 2 when linear, 4 when quadratic
