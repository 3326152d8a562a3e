"""The table of rules, extended by a user for an operator of their own."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn

from prune2deploy.errors import PruneError, TraceError
from prune2deploy.graph import rule, trace
from prune2deploy.graph.layout import unify
from prune2deploy.graph.rules import MODULE_RULES, RULES
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


class Mixing(nn.Module):
    """Two parameters, a hidden width and an attribute; the work is done where torch cannot see."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.dim = dim
        self.up = nn.Linear(dim, hidden)
        self.down = nn.Parameter(torch.randn(dim, hidden))
        self.unspoken = nn.Parameter(torch.randn(5))

    def forward(self, x, *, scale=1.0):
        assert x.shape[1] == self.dim, "the attribute must follow"
        seen = x.detach().numpy().transpose(0, 2, 3, 1)
        weight, bias = self.up.weight.detach().numpy(), self.up.bias.detach().numpy()
        hidden = np.maximum(seen @ weight.T + bias, 0)
        made = hidden @ self.down.detach().numpy().T * scale + float(self.unspoken.sum())
        both = torch.from_numpy(made.transpose(0, 3, 1, 2).astype(np.float32).copy())
        return both, both.mean((2, 3))


class Mixed(nn.Module):
    """Calls it between two convolutions, twice."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.mixing = Mixing(8, 16)
        self.gate = nn.Linear(8, 8)

    def forward(self, x):
        y, _ = self.mixing(self.first(x))
        y, pooled = self.mixing(y, scale=0.5)
        return self.last(y * self.gate(pooled)[:, :, None, None])


@pytest.fixture
def module_rule():
    @rule(Mixing)
    def mixing(call):
        x = call.dims("x")
        unify(x[1], call.dims("up.weight")[1])
        unify(x[1], call.dims("down")[0])
        unify(call.dims("up.weight")[0], call.dims("up.bias")[0])
        unify(call.dims("up.weight")[0], call.dims("down")[1])
        call.role("up.weight", 0, "out")
        call.symbols["dim"] = (x[1],)
        return [x, x[:2]]

    yield mixing
    del MODULE_RULES[Mixing]


@pytest.fixture
def mixed():
    torch.manual_seed(0)
    return Mixed().eval()


def test_without_a_rule_what_leaves_torch_stays(mixed):
    graph = trace(mixed, X)
    assert graph["first"].frozen == graph["mixing.up"].frozen == "its values are handed to NumPy"
    assert [axis.name for axis in graph.prunable] == ["mixing.unspoken"]  # summed up by torch


def test_what_is_computed_out_of_sight_is_never_taken_for_a_constant(mixed):
    """A captured module would return what the example gave, whatever its input."""
    graph = trace(mixed, X)
    with pytest.raises(PruneError, match=r"mixing hands values to NumPy.*rule"):
        capture(copy.deepcopy(mixed), mixed, graph, Plan({}))


class Tabled(nn.Module):
    """Makes a table of positions with NumPy: that is a constant."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.first(x)
        table = torch.from_numpy(torch.arange(4).float().numpy() ** 2)
        return self.last((y + table).reshape(y.shape[0], 8, 4, 4))


def test_tables_that_numpy_makes_are_constants():
    torch.manual_seed(0)
    model = Tabled().eval()
    graph = trace(model, X)
    captured = apply(model, graph, Plan({"first": (1, 2, 6)}))
    assert isinstance(captured, torch.fx.GraphModule)
    zeroed, other = copy.deepcopy(model), torch.randn(3, 3, 4, 4)
    with torch.no_grad():
        zeroed.last.weight[:, [0, 3, 4, 5, 7]] = 0
        torch.testing.assert_close(captured(other), zeroed(other))


@pytest.mark.usefixtures("module_rule")
@pytest.mark.parametrize("captured", [False, True])
def test_one_decorated_function_describes_a_module(mixed, captured):
    """Oracle: the original with the readers of what went set to zero computes the same."""
    graph = trace(mixed, X)
    assert {axis.name for axis in graph.prunable} == {"first", "mixing.up"}
    assert "does not speak of it" in graph["mixing.unspoken"].frozen
    kept = {"first": (0, 3, 4), "mixing.up": (1, 2, 5, 8, 13)}
    pruned = apply(mixed, graph, Plan(kept))
    assert type(pruned) is Mixed and pruned.mixing.dim == 3
    assert pruned.mixing.up.weight.shape == (5, 3) and pruned.mixing.up.out_features == 5
    if captured:
        pruned = capture(copy.deepcopy(pruned), mixed, graph, Plan(kept))
        assert isinstance(pruned.mixing, Mixing)
    zeroed = copy.deepcopy(mixed)
    gone = {name: [c for c in range(graph[name].size) if c not in kept[name]] for name in kept}
    with torch.no_grad():
        zeroed.mixing.up.weight[:, gone["first"]] = 0
        zeroed.mixing.down[:, gone["mixing.up"]] = 0
        zeroed.gate.weight[:, gone["first"]] = 0
        zeroed.last.weight[:, gone["first"]] = 0
        torch.testing.assert_close(pruned(X), zeroed(X))


class Trying(Mixed):
    """Gives the module what it refuses first."""

    def forward(self, x):
        with contextlib.suppress(AssertionError):
            self.mixing(x)
        return super().forward(x)


@pytest.mark.usefixtures("module_rule")
def test_a_module_with_a_rule_may_fail_where_the_model_catches_that():
    torch.manual_seed(0)
    model = Trying().eval()
    graph = trace(model, X)
    assert {axis.name for axis in graph.prunable} == {"first", "mixing.up"}
    pruned = apply(model, graph, Plan({"first": (0, 3, 4, 6)}))
    with torch.no_grad():
        assert type(pruned) is Trying and pruned(X).shape == (2, 2, 4, 4)


@pytest.mark.usefixtures("module_rule")
def test_a_rule_for_a_module_that_asks_for_what_is_not_there_is_told_what_is(mixed):
    @rule(Mixing)
    def wrong(call):
        return call.dims("weight")

    with pytest.raises(TraceError, match=r"asks for 'weight'.* x, down, unspoken, up.weight"):
        trace(mixed, X)


@pytest.mark.usefixtures("module_rule")
def test_a_rule_for_a_module_that_gives_wrong_sizes_is_found_out(mixed):
    @rule(Mixing)
    def wrong(call):
        return [call.dims("x"), call.dims("x")]

    with pytest.raises(TraceError, match=r"module Mixing gives layouts of sizes"):
        trace(mixed, X)
