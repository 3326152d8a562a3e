"""A captured module never repeats what the example's values answered."""

import copy

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.errors import PruneError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.answers import FollowsInput
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


READ = {
    "max": lambda x: float(x.max()),
    "min": lambda x: x.min().item(),
    "spread": lambda x: float(x.max() - x.min()),
    "deviation": lambda x: float(x.std()),
    "largest": lambda x: float(x.abs().max()),
    "mean": lambda x: float(x.mean()),
    "one": lambda x: float(x[0, 0, 0, 0]),
}
"""Statistics of the input itself, as numbers."""

EXAMPLES = {
    "ones": torch.ones(2, 3, 4, 4),
    "zeros": torch.zeros(2, 3, 4, 4),
    "masked": X.masked_fill(X > 1.5, -torch.inf),
}


def picked(how):
    """Reads positions that follow the input out of torch, as whole numbers."""

    def between(model, y):
        rows = how(y.detach().mean(1).flatten(1).argmax(1))
        return y * torch.stack([model.limit * int(row) for row in rows]).sum()

    return between


def written(model, y):
    """Positions go by way of a table that is filled in place."""
    table = torch.zeros(2, 2, dtype=torch.long)
    table[0].copy_(y.detach().mean(1).flatten(1).argmax(1))
    return y * sum(table.tolist()[0])


def asking_for_positions(model, y):
    """Positions and sizes that no value of the input decides."""
    rows, ones = torch.arange(y.shape[2]).tolist(), torch.ones_like(y[0, 0, 0]).long().tolist()
    return y * sum(rows) + sum(torch.tensor(y.shape[2:]).numpy()) + sum(ones)


def scaled_by_a_tensor(model, y):
    return y / y.abs().amax()


def asking_for_a_setting(model, y):
    return y.clamp(max=model.limit.item())


class Drawing(nn.Module):
    """Its code holds a width as a constant, and draws numbers."""

    def __init__(self, generator):
        super().__init__()
        self.first, self.last, self.generator = nn.Linear(8, 16), nn.Linear(16, 4), generator

    def forward(self, x):
        x = torch.relu(self.first(x)).reshape(-1, 16)
        kept = torch.bernoulli(torch.full(x.shape[:1], 0.5), generator=self.generator)
        return self.last(x * kept[:, None])


def test_numbers_of_a_generator_are_not_captured():
    x = torch.randn(2, 8)
    assert isinstance(prune2deploy.prune(Drawing(None), x), torch.fx.GraphModule)
    with pytest.raises(PruneError, match=r"from a torch\.Generator"):
        prune2deploy.prune(Drawing(torch.Generator()), x)


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


class Reading(Spelt):
    """Divides by a number that it reads of its inputs."""

    def __init__(self, read):
        super().__init__(lambda model, y: y)
        self.read = read

    def forward(self, x, *more):
        return super().forward(x) / self.read(x, *more)


def refused(model, *given):
    with pytest.raises(FollowsInput, match="reads the value"):
        apply(model, trace(model, given), Plan({"first": (0, 2, 5)}))


@pytest.mark.parametrize("read", READ)
def test_statistics_of_the_input_are_not_captured(read):
    refused(Reading(READ[read]).eval(), X)


@pytest.mark.parametrize("example", EXAMPLES)
def test_nor_are_they_where_the_example_is_unusual(example):
    refused(Reading(READ["max"]).eval(), EXAMPLES[example])


def test_single_numbers_and_the_samples_of_whole_ones_are_inputs_too():
    refused(Reading(lambda x, time: float(time)).eval(), X, torch.tensor(0.7))
    refused(Reading(lambda x, time: float(time)).eval(), X, torch.tensor(0.0))
    refused(Reading(lambda x, kinds: int(kinds[0])).eval(), X, torch.tensor([3, 5]))


@pytest.mark.parametrize(
    "between", [picked(torch.Tensor.tolist), picked(torch.Tensor.numpy), written]
)
def test_whole_numbers_that_follow_the_input_do_not_leave(between):
    model = Spelt(between).eval()
    with pytest.raises(FollowsInput, match="hands values to"):
        apply(model, trace(model, X), Plan({"first": (0, 2, 5)}))


@pytest.mark.parametrize(
    "between", [scaled_by_a_tensor, asking_for_a_setting, asking_for_positions]
)
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
