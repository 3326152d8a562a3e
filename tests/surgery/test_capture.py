"""Captured modules: what they keep of the code that they replace, and what they cannot hold."""

import copy
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.errors import PruneError
from prune2deploy.graph import trace
from prune2deploy.graph.calling import tensors_in
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


def test_a_layer_that_is_lent_weights_is_not_called_with_its_own():
    def lent(net, x):
        weights = {"weight": net.inner.weight * net.scale, "bias": net.inner.bias}
        return torch.func.functional_call(net.inner, weights, (x,))

    model = Net(lent, inner=nn.Linear(8, 8), scale=nn.Parameter(torch.rand(8, 1))).eval()
    x = torch.randn(4, 5, 6)
    torch.testing.assert_close(captured(model, x)(x), model(x))


MAPPED = {
    "layer": lambda net, x: torch.vmap(net.inner)(x),
    "dropout": lambda net, x: torch.vmap(lambda row: F.dropout(row, 0.4, net.training))(x),
    "function": lambda net, x: torch.vmap(lambda row: torch.tanh(net.inner.weight @ row))(x),
}


@pytest.mark.parametrize("name", MAPPED)
def test_functions_that_are_mapped_over_a_tensor_are_recorded_as_they_run(name):
    model = Net(MAPPED[name], inner=nn.Linear(8, 8)).eval()
    again = captured(model, torch.randn(1, 6))
    x = torch.randn(4, 6)
    torch.testing.assert_close(again(x), model(x))


class Forces(nn.Module):
    """Returns gradients of what it computes by its layers."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.SiLU())
        self.last = nn.Linear(8, 1)

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (found,) = torch.autograd.grad(self.last(self.layers(x)).sum(), x)
        return found


def test_layers_whose_inner_values_gradients_read_are_written_out():
    model, x = Forces().eval(), torch.randn(4, 6)
    torch.testing.assert_close(captured(model, x)(x), model(x))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("first", [False, True])
def test_the_state_of_a_recurrent_layer_follows_the_batch(kind, first):
    class Reading(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = kind(6, 8, num_layers=2, bidirectional=True, batch_first=first)
            self.last = nn.Linear(16, 3)

        def forward(self, x):
            found = self.rnn(x if first else x.transpose(0, 1))[0]
            return self.last(found if first else found.transpose(0, 1))

    model = Reading().eval()
    again = captured(model, torch.randn(1, 5, 6))
    for batch in (1, 3):
        x = torch.randn(batch, 5, 6)
        torch.testing.assert_close(again(x), model(x))


def test_new_tensors_that_parts_are_written_to_become_values():
    def shifted(net, x):
        found = x.new_zeros(x.shape)
        found[:, 1:] = x[:, :-1]
        return found

    model, x = Net(shifted).eval(), torch.randn(4, 6)
    again = captured(model, x)
    torch.testing.assert_close(again(x), model(x))
    assert not [n for n in again.graph.nodes if "copy_" in str(n.target)]


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


def copied_and_changed(model, x):
    y = x.to(torch.float32, copy=True)
    y.relu_()
    return y.to(memory_format=torch.contiguous_format, copy=True).neg_() + y - x


MEMORY = {
    "a copy": copied_and_changed,
    "other elements": lambda model, x: x.view(torch.int32).bitwise_and(-65536).view(torch.float32),
    "larger elements": lambda model, x: x.view(torch.complex64).conj_physical().view(torch.float32),
}


@pytest.mark.parametrize("name", MEMORY)
def test_memory_is_copied_and_read_as_in_the_code(name):
    model, x = Net(MEMORY[name]).eval(), torch.randn(4, 6)
    graph = trace(model, x)
    apart = name != "larger elements"
    assert bool(graph.prunable) is apart
    torch.testing.assert_close(captured(model, x)(x), model(x))
    if apart:
        assert apply(model, graph, Plan({"first": (0, 3)}))(x).shape == (4, 3)
    else:
        assert graph["first"].frozen == "its elements are read as another type"


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


class Pair(NamedTuple):
    y: Any
    more: Any


@dataclass(frozen=True)
class Late:
    y: Any
    steps: int = field(init=False, default=3)
    peak: Any = field(init=False)


def late(y):
    made = Late(y)
    object.__setattr__(made, "peak", y.amax())
    return made


RESULTS = {
    "named tuple": lambda y: Pair(y, [Pair(y, 1)]),
    "torch's": lambda y: y.max(1),
    "dataclass": late,
    "ordered": lambda y: OrderedDict(y=y, more=2),
}


@pytest.mark.parametrize("name", RESULTS)
def test_results_keep_their_class(name):
    class Returning(Net):
        def forward(self, x):
            return RESULTS[name](super().forward(x))

    model = Returning(lambda net, x: x).eval()
    again, other = captured(model, torch.randn(4, 6)), torch.randn(4, 6)
    found, wanted = again(other), model(other)
    assert type(found) is type(wanted)
    torch.testing.assert_close(list(tensors_in(found)), list(tensors_in(wanted)))
    if name == "named tuple":
        assert (found.more[0].more, found.more[0].y.shape) == (1, found.y.shape)
    if name == "dataclass":
        assert found.steps == 3


@dataclass
class Batch:
    x: Any
    scale: float
    more: Any = None


class Opaque:
    def __init__(self, x, scale):
        self.x, self.scale = x, scale


class Taking(nn.Module):
    """Takes its tensors from inside of what it is given, and may spell a width out."""

    def __init__(self, spelt=True):
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
        self.spelt = spelt

    def forward(self, batch):
        y = self.first(batch.x).view(len(batch.x), 8 if self.spelt else -1) * batch.scale
        return self.last(y) + (batch.more[0].y if isinstance(batch, Batch) else 0)


def half(model, given):
    return apply(model, trace(model, given), Plan({"first": (0, 3, 4, 6)}))


def test_inputs_may_lie_in_dataclasses_and_named_tuples():
    model = Taking().eval()
    given, other = (
        (Batch(torch.randn(4, 6), 2.0, (Pair(torch.randn(4, 3), 0),)),) for _ in range(2)
    )
    pruned = half(model, given)
    assert isinstance(pruned, torch.fx.GraphModule)
    torch.testing.assert_close(captured(model, given)(*other), model(*other))
    shifted = pruned(Batch(other[0].x, 2.0, (Pair(other[0].more[0].y + 1, 0),)))
    torch.testing.assert_close(shifted, pruned(*other) + 1)


def test_tensors_that_objects_bring_along_are_not_taken_for_constants():
    model = Taking().eval()
    with pytest.raises(PruneError, match=r"shape \(4, 6\) from inside an input of class Opaque"):
        half(model, (Opaque(torch.randn(4, 6), 2.0),))
    pruned = half(Taking(spelt=False), (Opaque(torch.randn(4, 6), 2.0),))
    assert pruned.first.out_features == 4


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


class Statistics(nn.Module):
    """Hands out the deviation by which a layer norm divided."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(8, 8)

    def forward(self, x):
        x = self.first(x)
        y, _, scale = torch.native_layer_norm(x, x.shape[-1:], None, None, 1e-5)
        return y.view(-1, 8).sum(1), scale


def test_results_that_functions_do_not_give_are_refused_in_words():
    model, x = Statistics().eval(), torch.randn(2, 8)
    with pytest.raises(PruneError, match="reads more of a normalisation"):
        capture(copy.deepcopy(model), model, trace(model, x), Plan({}))
