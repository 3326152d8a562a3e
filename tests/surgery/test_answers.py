"""A captured module never repeats what the example's values answered."""

import copy

import pytest
import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

X = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Spelt(nn.Module):
    """Holds a width as a constant, so that pruning needs the captured form."""

    def __init__(self, between):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.register_buffer("limit", torch.tensor(1.5))
        self.between = between

    def forward(self, x):
        y = self.between(self, self.first(x))
        return self.last(y.reshape(y.shape[0], 8, 4, 4))


def scaled_by_a_number(model, y):
    return y / float(y.detach().abs().max())


def branching(model, y):
    left, right = y.detach().tensor_split(2, dim=3)
    return y * 2 if left.mean() > right.mean() else y


def listed(model, y):
    peaks = y.detach().flatten(1).amax(1).tolist()
    return y / torch.tensor(peaks)[:, None, None, None]


def compared(model, y):
    return y if torch.equal(y, y.relu()) else y + float(y.detach().std())


def scaled_by_a_tensor(model, y):
    return y / y.abs().amax()


def asking_for_a_setting(model, y):
    return y.clamp(max=model.limit.item())


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("between", [scaled_by_a_number, branching, listed, compared])
def test_values_that_follow_the_input_are_not_captured(between):
    model = Spelt(between).eval()
    graph = trace(model, X)
    told = "hands values to a list" if between is listed else "reads the value of a tensor that dep"
    with pytest.raises(PruneError, match=told):
        apply(model, graph, Plan({"first": (0, 2, 5)}))


@pytest.mark.parametrize("between", [scaled_by_a_tensor, asking_for_a_setting])
def test_values_that_do_not_are(between):
    model = Spelt(between).eval()
    captured = capture(copy.deepcopy(model), model, trace(model, X), Plan({}))
    other = 3 * torch.randn(2, 3, 4, 4) - 1
    with torch.no_grad():
        torch.testing.assert_close(captured(other), model(other))


def test_a_model_whose_own_code_runs_may_read_what_it_likes():
    class Free(Spelt):
        def forward(self, x):
            return self.last(scaled_by_a_number(self, self.first(x)))

    model = Free(None).eval()
    pruned = apply(model, trace(model, X), Plan({"first": (0, 2, 5)}))
    assert isinstance(pruned, Free) and pruned.first.out_channels == 3
