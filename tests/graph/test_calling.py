"""A model is left as it was, whatever its attributes are made of."""

from collections import Counter, deque

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prune2deploy
from prune2deploy.graph import trace
from prune2deploy.graph.calling import quiet
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.slicing import apply

from .zeroed import zeroed


class Settings(dict):
    """Refuses to be changed, as some libraries' configurations do."""

    def _refuse(self, *_, **__):
        raise TypeError("settings are fixed")

    __setitem__ = __delitem__ = update = clear = pop = setdefault = _refuse


class Caching(nn.Module):
    """Keeps settings that cannot be changed, and a cache that its forward pass fills."""

    def __init__(self):
        super().__init__()
        self.settings = Settings(width=8)
        self.cache = {"old": 1}
        self.first, self.last = nn.Linear(4, self.settings["width"]), nn.Linear(8, 2)

    def forward(self, x):
        self.cache["new"] = x
        self.seen = x.shape
        return self.last(self.first(x))


def test_a_table_that_refuses_writes_is_no_obstacle():
    model = Caching()
    graph = trace(model, torch.randn(1, 4))
    assert [axis.size for axis in graph.prunable] == [8]


class Wrapped(nn.Module):
    """Holds a program of torch.export, as code around a deployed model does."""

    def __init__(self, program):
        super().__init__()
        self.program, self.last = program, nn.Linear(2, 2)

    def forward(self, x):
        return self.last(self.program(x))


def test_programs_of_torch_export_are_pruned_and_left_as_they_were():
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 4)
    module = torch.export.export(net, (x,), strict=False).module()
    for model in (module, Wrapped(module)):
        before, flags = dict(vars(module)), [part.training for part in model.modules()]
        assert [axis.size for axis in trace(model, x).prunable][:1] == [8]
        pruned = prune2deploy.prune(model, x, 0.5)
        assert pruned.eval().training is False
        assert vars(module) == before and flags == [part.training for part in model.modules()]
    narrow = prune2deploy.prune(module, x, 0.5)
    torch.testing.assert_close(narrow(x), prune2deploy.prune(net, x, 0.5)(x))
    with pytest.raises(NotImplementedError):
        module.eval()


class Recalling(nn.Module):
    """Fills containers of every kind, also such as lie in others."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 2)
        self.history, self.recent = ["old"], deque(["old"], maxlen=1)
        self.cache, self.sizes = {"all": [1]}, {4}
        self.counts, self.pair = Counter(calls=1), ([], {"deep": set()})

    def forward(self, x):
        hidden = self.first(x)
        self.history.append(hidden)
        self.recent.append(hidden)
        self.cache["last"] = hidden
        self.cache["all"].append(hidden)
        self.sizes.add(hidden.shape[1])
        self.counts["calls"] += 1
        self.pair[0].append(hidden)
        self.pair[1]["deep"].add(hidden)
        return self.last(hidden)


def test_containers_that_the_forward_pass_fills_are_as_they_were():
    model = Recalling()
    kept = dict(vars(model))
    graph = trace(model, torch.randn(1, 4))
    assert [axis.size for axis in graph.prunable] == [8]
    assert all(vars(model)[name] is held for name, held in kept.items())
    assert (model.history, model.recent, model.sizes) == (["old"], deque(["old"]), {4})
    assert model.cache == {"all": [1]} and model.counts == {"calls": 1}
    assert model.pair == ([], {"deep": set()})
    assert prune2deploy.prune(model, torch.randn(1, 4), 0.5)(torch.randn(1, 4)).shape == (1, 2)
    assert model.history == ["old"] and model.cache == {"all": [1]}


def test_what_the_forward_pass_keeps_is_forgotten():
    model = Caching().train()
    cache = model.cache
    with quiet(model):
        model(torch.randn(1, 4))
        assert not model.training and "new" in model.cache
    assert model.training and model.cache is cache and cache == {"old": 1}
    assert not hasattr(model, "seen")


class Counting(nn.Module):
    """Keeps count of its calls and a running mean, and asks for a value where it is told to."""

    def __init__(self, asks):
        super().__init__()
        self.first, self.last, self.asks = nn.Linear(4, 8), nn.Linear(8, 2), asks
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("mean", torch.zeros(8))

    def forward(self, x):
        self.calls += 1
        x = self.first(x)
        if self.asks and self.calls < 0:
            x = -x
        self.mean.mul_(0.9).add_(x.detach().mean(0), alpha=0.1)
        return self.last(x - self.mean)


@pytest.mark.parametrize("asks", [False, True])
def test_buffers_that_the_forward_pass_writes_to_hold_what_they_held(asks):
    model = Counting(asks).eval()
    pruned = prune2deploy.prune(model, torch.randn(2, 4), ratio=0.5)
    assert (model.calls.item(), pruned.calls.item()) == (0, 0)
    assert pruned.mean.tolist() == [0.0] * 4
    assert not model.mean.any()


class Bounded(nn.Module):
    """Its forward pass shortens the rows that it reads, in place; one that asks runs on values."""

    def __init__(self, asks):
        super().__init__()
        self.rows, self.asks = nn.Embedding(6, 8, max_norm=0.5), asks
        self.first, self.last = nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(self.rows(x))
        return self.last(x * 2 if self.asks and x.sum() > -1e9 else x)


@pytest.mark.parametrize("asks", [False, True])
def test_weights_that_the_forward_pass_writes_to_hold_what_they_held(asks):
    model = Bounded(asks).eval()
    before = model.rows.weight.detach().clone()
    shared = model.rows.weight.data  # the very memory is restored, not another put in its place
    prune2deploy.prune(model, torch.arange(6), ratio=0.5)
    assert torch.equal(model.rows.weight, before)
    assert shared.data_ptr() == model.rows.weight.data_ptr()
    model(torch.arange(6))
    assert not torch.equal(model.rows.weight, before)


def test_inference_mode_around_the_calls_changes_nothing():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Flatten(), nn.Linear(32, 2)).eval()
    with torch.inference_mode():
        pruned = prune2deploy.prune(model, torch.randn(1, 3, 2, 2), ratio=0.5)
    assert pruned[0].out_channels == 4
    pruned(torch.randn(1, 3, 2, 2)).sum().backward()
    assert pruned[0].weight.grad is not None


class Spare(nn.Module):
    """Has a part that evaluation leaves out, so that it is run in training mode too."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.last, self.spare = nn.Conv2d(8, 2, 1), nn.Linear(8, 8)

    def forward(self, x):
        x = self.norm(self.first(x))
        return self.last(-x if x.max() > 1e9 else x)


def test_statistics_that_kernels_write_unseen_are_as_they_were():
    model = Spare().eval()
    graph = trace(model, torch.randn(1, 3, 4, 4) + 1)
    assert not graph.recording.on_shapes
    assert not model.norm.running_mean.any() and (model.norm.running_var == 1).all()


class Inferring(nn.Module):
    """Enters inference mode by itself, and normalises by the batch whatever its mode."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("var", torch.ones(8))

    @torch.inference_mode()
    def forward(self, x):
        return self.last(F.batch_norm(self.first(x), self.mean, self.var, training=True))


def test_models_that_enter_inference_mode_are_pruned_and_left_as_they_were():
    torch.manual_seed(0)
    model, x = Inferring().eval(), torch.randn(2, 3, 4, 4)
    graph = trace(model, x)
    assert [(axis.name, axis.frozen) for axis in graph.axes] == [
        ("first", None), ("first:1", "model input"), ("last", "model output"),
    ]  # fmt: skip
    plan = Plan({"first": (1, 2, 5)})
    pruned = apply(model, graph, plan)
    assert not model.mean.any() and model.var.eq(1).all() and not pruned.mean.any()
    torch.testing.assert_close(pruned(x), zeroed(model, graph, plan)(x))


class Rows(nn.Module):
    """Rows of a table that are shortened when they are read."""

    def __init__(self):
        super().__init__()
        self.table, self.last = nn.Embedding(6, 8, max_norm=0.5), nn.Linear(8, 2)

    def forward(self, numbers):
        return self.last(self.table(numbers))


def test_tables_that_shorten_their_rows_lose_columns():
    torch.manual_seed(0)
    model, numbers = Rows().eval(), torch.tensor([[0, 3, 3]])
    before = model.table.weight.detach().clone()
    pruned = prune2deploy.prune(model, numbers, ratio=0.5)
    assert pruned.table.weight.shape == (6, 4) and torch.equal(model.table.weight, before)


class Leaking(nn.Module):
    """A block with a shortcut, whose hidden values are read after it too."""

    def __init__(self, leaks):
        super().__init__()
        self.stem, self.block, self.last = nn.Linear(4, 8), Shortcut(), nn.Linear(8, 2)
        self.leaks = leaks

    def forward(self, x):
        x = self.block(self.stem(x))
        return self.last(x + self.block.hidden if self.leaks else x)


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        self.hidden = self.inner(x).relu()
        return x + self.outer(self.hidden)


@pytest.mark.parametrize("leaks", [False, True])
def test_blocks_whose_inside_is_read_elsewhere_cannot_go(leaks):
    graph = trace(Leaking(leaks).eval(), torch.randn(2, 4))
    assert [block.name for block in graph.blocks] == ([] if leaks else ["block"])


class Failing(nn.Module):
    """Fails after some work, inside a part of its own."""

    def __init__(self):
        super().__init__()
        self.part = nn.Linear(4, 8)

    def forward(self, x):
        return self.part(x.relu())


class Catching(nn.Module):
    """Goes on where a part of it fails."""

    def __init__(self):
        super().__init__()
        self.first, self.failing, self.last = nn.Linear(4, 8), Failing(), nn.Linear(8, 2)

    def forward(self, x):
        y = self.first(x)
        try:
            y = self.failing(y)
        except RuntimeError:
            y = y.sigmoid()
        return self.last(y)


def test_a_part_that_failed_is_over():
    """What follows belongs to the model, not to the part, which gave nothing."""
    recording = trace(Catching(), torch.ones(3, 4)).recording
    assert [call.name for call in recording.calls] == ["first", "last", ""]
    scopes = {operation.name: operation.scope for operation in recording.operations}
    assert scopes["aten::relu"] == "failing" and scopes["aten::sigmoid"] == ""
