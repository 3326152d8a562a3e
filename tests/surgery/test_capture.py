"""Captured modules: what they keep of the code that they replace, and what they cannot hold."""

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.errors import PruneError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.copying import copied
from prune2deploy.surgery.slicing import apply


class Net(nn.Module):
    """Two layers, something between."""

    def __init__(self, between, **parts):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        for name, part in parts.items():
            setattr(self, name, part)
        self._between = between

    def forward(self, x):
        return self.last(self._between(self, self.first(x)))


def captured(model, x):
    return capture(copied(model, {}), model, trace(model, x), Plan({}))


def in_training(model, x):
    torch.manual_seed(1)
    return model.train()(x)


class Path(nn.Module):
    """Stochastic depth: leaves out whole samples, in training only."""

    def forward(self, x):
        return x * (torch.rand(len(x), 1, 1) > 0.5) if self.training else x


BETWEEN = {
    "function": lambda net, x: F.dropout(x, 0.4, net.training),
    "function by keywords": lambda net, x: F.dropout(x, training=net.training, p=0.4, inplace=True),
    "function with its input": lambda net, x: x + F.dropout(x, 0.4, net.training),
    "alpha": lambda net, x: F.alpha_dropout(x, 0.4, net.training),
    "channels": lambda net, x: F.dropout1d(x, 0.4, net.training),
    "module": lambda net, x: net.drop(x),
    "module with its input": lambda net, x: x + net.drop(x),
    "stochastic depth": lambda net, x: x + net.path(x.relu()),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_what_is_dropped_in_training_only_is_dropped_by_the_captured_form_too(name):
    torch.manual_seed(0)
    model, x = Net(BETWEEN[name], drop=nn.Dropout(0.4), path=Path()).eval(), torch.randn(4, 5, 6)
    again = captured(model, x)
    torch.testing.assert_close(again.eval()(x), model(x))
    wanted = in_training(model, x)
    torch.testing.assert_close(in_training(again, x), wanted)
    assert not torch.allclose(wanted, model.eval()(x))


def test_dropout_is_neither_a_layer_nor_a_reason_to_freeze():
    model, x = Net(BETWEEN["function"]).eval(), torch.randn(4, 5, 6)
    graph = trace(model, x)
    assert [a.name for a in graph.prunable] == ["first"] and not graph.unknown
    pruned = apply(model, graph, Plan({"first": (0, 3)}))
    assert type(pruned) is Net and pruned.first.out_features == 2


def test_modules_that_work_in_place_are_kept():
    parts = {"act": nn.ReLU(inplace=True), "same": nn.Identity(), "drop": nn.Dropout(0.0)}
    model = Net(lambda net, x: net.drop(net.act(net.same(x))), **parts).eval()
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(captured(model, x)(x), model(x))


def paste(model, x):
    """Write what was computed into new tables, and read those only through what is made of them."""
    tables = []
    for row in x:
        table = torch.zeros(3, 8)
        table[0] = 2.0
        table[1:2] = row
        tables.append(table)
    return torch.stack(tables).sum(1)


def test_tables_that_computed_values_are_written_into_are_not_taken_for_constants():
    torch.manual_seed(0)
    model, x = Net(paste).eval(), torch.randn(4, 6)
    again = captured(model, x)
    with torch.no_grad():
        for given in (x, torch.randn(4, 6)):
            torch.testing.assert_close(again(given), model(given))


class Memory:
    """An object that holds more than source text can say."""


@dataclass
class Answer:
    logits: Any
    memory: Any = None
    steps: int = 0


def test_what_cannot_be_written_down_is_none_in_the_result():
    class Remembering(Net):
        def forward(self, x):
            y = super().forward(x)
            return Answer(y, Memory(), 7) if self.whole else {"y": y, "memory": [Memory(), y]}

    for whole in (True, False):
        model, x = Remembering(lambda net, x: x, whole=whole).eval(), torch.randn(4, 5, 6)
        found, wanted = captured(model, x)(x), model(x)
        if whole:
            assert type(found) is Answer and (found.memory, found.steps) == (None, 7)
            torch.testing.assert_close(found.logits, wanted.logits)
        else:
            assert found["memory"][0] is None
            torch.testing.assert_close(found["memory"][1], wanted["y"])


def test_a_name_that_captured_modules_need_themselves_is_refused_by_name():
    model, x = Net(lambda net, x: net.code(x), code=nn.Linear(8, 8)), torch.randn(4, 5, 6)
    with pytest.raises(PruneError, match="part called 'code'"):
        captured(model, x)


HOOKS = {
    "after": lambda part: part.register_forward_hook(lambda module, given, made: made * 2),
    "before": lambda part: part.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
    "both": lambda part: (HOOKS["after"](part), HOOKS["before"](part)),
    "watching": lambda part: part.register_forward_hook(lambda module, given, made: None),
    "weight": lambda part: nn.utils.weight_norm(part),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("name", HOOKS)
def test_what_hooks_of_a_module_do_is_done_once(name):
    torch.manual_seed(0)
    parts = {"mix": nn.Linear(8, 8), "drop": nn.Dropout(0.4)}
    model = Net(lambda net, x: net.drop(net.mix(x)), **parts).eval()
    HOOKS[name](model.mix)
    if name != "weight":
        HOOKS[name](model.drop)
    x = torch.randn(4, 5, 6)
    again = captured(model, x)
    torch.testing.assert_close(again(x), model(x))
    torch.testing.assert_close(in_training(again, x), in_training(model, x))
