"""The table of rules, extended by a user for an operator of their own."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from prune2deploy.errors import TraceError
from prune2deploy.graph import rule, trace
from prune2deploy.graph.layout import unify
from prune2deploy.graph.rules import RULES
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply


@torch.library.custom_op("users_own::scaled", mutates_args=())
def scaled(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Work that torch cannot look into."""
    found = x.detach().numpy() * scale.detach().numpy()[None, :, None, None]
    return torch.from_numpy(found.astype(np.float32))


class Scaling(nn.Module):
    """A module that calls it."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.scale = nn.Parameter(torch.rand(8))

    def forward(self, x):
        return self.last(torch.ops.users_own.scaled(self.first(x), self.scale))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Scaling().eval()


@pytest.fixture
def own_rule():
    before = dict(RULES)

    @rule("users_own::scaled")
    def per_channel(call):
        unify(call.dims("x")[1], call.dims("scale")[0])
        return call.dims("x")

    yield per_channel
    RULES.clear()
    RULES.update(before)


X = torch.randn(2, 3, 4, 4)


def test_without_a_rule_what_an_operator_touches_stays_and_it_is_named(model):
    graph = trace(model, X)
    assert graph.unknown == {"users_own::scaled": 1}
    assert graph["first"].frozen == "operator users_own::scaled has no rule"
    assert not graph.prunable


@pytest.mark.usefixtures("own_rule")
@pytest.mark.parametrize("captured", [False, True])
def test_one_decorated_function_makes_its_channels_prunable(model, captured):
    graph = trace(model, X)
    assert not graph.unknown
    (axis,) = graph.prunable
    assert {m.tensor for m in axis.members} >= {"first.weight", "scale", "last.weight"}
    kept = (0, 3, 4)
    plan = Plan({axis.name: kept})
    pruned = apply(model, graph, plan)
    if captured:
        pruned = capture(copy.deepcopy(pruned), model, graph, plan)
    zeroed = copy.deepcopy(model)
    gone = [channel for channel in range(8) if channel not in kept]
    with torch.no_grad():
        zeroed.last.weight[:, gone] = 0
        torch.testing.assert_close(pruned(X), zeroed(X))


@pytest.mark.usefixtures("own_rule")
def test_a_rule_that_gives_wrong_sizes_is_found_out(model):
    @rule("users_own::scaled")
    def wrong(call):
        return call.dims("scale")

    with pytest.raises(TraceError, match=r"users_own::scaled gives layouts of sizes \[\(8,\)\]"):
        trace(model, X)
