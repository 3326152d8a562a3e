"""Weights that are left take over: against planted redundancy, closed forms and convolutions."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.recover import least_squares, reconstruct, reestimate_batchnorm
from prune2deploy.recover.contractions import contraction, last_weights
from prune2deploy.recover.least_squares import LONGEST, correction
from prune2deploy.surgery.slicing import apply

EXAMPLE = (torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(9)),)

EXAMPLE_ROW = (torch.zeros(1, 4),)


def data(count=64, seed=1, shape=(3, 8, 8), batch=16):
    dice = torch.Generator().manual_seed(seed)
    return [((torch.randn(batch, *shape, generator=dice),), None) for _ in range(count // batch)]


def pruned(net, kept, removed=(), example=EXAMPLE):
    """A pruned copy, with its graph and plan; ``kept`` maps a word in an axis' name to channels."""
    graph = trace(net, example)
    names = {next(a.name for a in graph.prunable if a.name == word): c for word, c in kept.items()}
    plan = Plan(names, tuple(removed))
    return apply(net, graph, plan, example), graph, plan


def apart(one, other, batches):
    """Squared difference of two models' outputs relative to the second's, on samples of batches."""
    with torch.no_grad():
        pairs = [(one(*inputs), other(*inputs)) for inputs, _ in batches]
    return float(sum((a - b).square().sum() for a, b in pairs)) / float(
        sum(b.square().sum() for _, b in pairs)
    )


class Net(nn.Module):
    """Two convolutions with batch normalisation, and a classifier."""

    def __init__(self, width=16):
        super().__init__()
        self.one, self.norm1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.two, self.norm2 = nn.Conv2d(width, 12, 3, 2, 1, bias=False), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)

    def forward(self, x):
        x = self.norm1(self.one(x)).relu()
        x = self.norm2(self.two(x)).relu()
        return self.head(x.mean((2, 3)))


def with_copies():
    """Channels 8 to 15 of the first layer are copies of the first eight, twice as large."""
    torch.manual_seed(0)
    net = Net()
    with torch.no_grad():
        net.one.weight[8:] = 2 * net.one.weight[:8]
        net.norm1.weight.uniform_(0.5, 1.5)
        net.norm1.weight[8:] = net.norm1.weight[:8]
    reestimate_batchnorm(net, data(256, seed=3))
    return net.eval()


def test_copies_that_go_are_made_up_for():
    net = with_copies()
    small, graph, plan = pruned(net, {"one": tuple(range(8))})
    plain = copy.deepcopy(small)
    reestimate_batchnorm(plain, data())
    done = reconstruct(small, net, graph, plan, data())
    assert done.note == "" and done.layers >= 1 and done.samples == 56  # the others judge
    fresh = data(seed=2)
    assert apart(plain, net, fresh) > 0.05
    assert apart(small, net, fresh) < 1e-3


def test_original_modes_and_repeats():
    net = with_copies()
    state = copy.deepcopy(net.state_dict())
    small, graph, plan = pruned(net, {"one": tuple(range(8))})
    again = copy.deepcopy(small)
    again.norm1.train()
    reconstruct(small, net, graph, plan, data())
    reconstruct(again, net, graph, plan, data())
    assert again.norm1.training and not again.norm2.training
    for name, value in net.state_dict().items():
        assert torch.equal(value, state[name]), name
    for name, value in small.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_nothing_pruned_changes_no_weight():
    net = with_copies()
    small, graph, plan = pruned(net, {})
    done = reconstruct(small, net, graph, plan, data())
    assert (done.layers, done.of, done.note) == (0, 0, "")
    assert all(torch.equal(v, net.state_dict()[n]) for n, v in small.state_dict().items())


def test_what_does_not_hold_on_other_samples_is_not_done():
    """Samples that are fitted to are of another kind than those that judge, which come first."""
    torch.manual_seed(0)
    net, example = nn.Sequential(nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 3)).eval(), EXAMPLE_ROW
    small, graph, plan = pruned(net, {"0": tuple(range(24))}, example=example)
    before = copy.deepcopy(small.state_dict())
    first, *others = data(128, shape=(4,), batch=16)
    judges = ((-first[0][0].abs(),), None)
    strange = [((inputs.abs(),), None) for (inputs,), _ in others]
    done = reconstruct(small, net, graph, plan, [judges, *strange])
    assert done.layers == 0 and "on 16 other samples the outputs differed" in done.note
    assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())
    assert reconstruct(small, net, graph, plan, data(128, shape=(4,))).layers == 1


def test_random_nets_come_nearer_than_by_batchnorm_alone():
    for seed in range(4):
        torch.manual_seed(seed)
        net = Net(24)
        reestimate_batchnorm(net, data(256, seed=3))
        net.eval()
        small, graph, plan = pruned(net, {"one": tuple(range(0, 24, 2)), "two": tuple(range(9))})
        plain = copy.deepcopy(small)
        reestimate_batchnorm(plain, data(128))
        assert reconstruct(small, net, graph, plan, data(128)).layers >= 2
        fresh = data(seed=2)
        assert apart(small, net, fresh) < 0.5 * apart(plain, net, fresh)


class Residual(nn.Module):
    """A stream with a block that may go."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.blocks = nn.ModuleList(Inner() for _ in range(2))
        self.head = nn.Conv2d(16, 4, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Inner(nn.Module):
    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(16, 16, 3, padding=1), nn.Conv2d(16, 16, 1)

    def forward(self, x):
        return x + self.up(self.down(x).relu())


def test_what_is_left_makes_up_for_a_removed_block():
    torch.manual_seed(0)
    net = Residual().eval()
    small, graph, plan = pruned(net, {"blocks.1.down": tuple(range(8))}, ["blocks.0"])
    before = apart(small, net, data(seed=2))
    done = reconstruct(small, net, graph, plan, data())
    assert done.layers >= 2
    assert apart(small, net, data(seed=2)) < 0.5 * before


class Fixed(nn.Module):
    """Code that spells its width out, so that its pruned form is a captured one."""

    def __init__(self):
        super().__init__()
        self.into, self.mid, self.out = nn.Linear(12, 32), nn.Linear(32, 32), nn.Linear(32, 6)

    def forward(self, x):
        heads = self.into(x).view(-1, 4, 8).relu()
        return self.out(self.mid(heads.reshape(-1, 32)).relu())


def test_captured_form():
    torch.manual_seed(0)
    net, example = Fixed().eval(), (torch.randn(1, 12),)
    graph = trace(net, example)
    kept = {a.name: tuple(range(a.size // 2)) for a in graph.prunable}
    plan = Plan(kept)
    small = apply(net, graph, plan, example)
    assert isinstance(small, torch.fx.GraphModule)
    before = apart(small, net, data(seed=2, shape=(12,)))
    done = reconstruct(small, net, graph, plan, data(256, shape=(12,)))
    assert done.layers == 2, done
    assert apart(small, net, data(seed=2, shape=(12,))) < 0.7 * before


class Twice(nn.Module):
    """A weight that is used twice, one that serves as a table as well, and a transposed one."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.both = nn.Conv2d(8, 8, 3, padding=1)
        self.wide = nn.ConvTranspose2d(8, 6, 2, 2)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x):
        x = self.both(self.both(self.first(x)).relu()).relu()
        return self.last(self.wide(x))


def test_weights_that_others_use_too_stay():
    torch.manual_seed(0)
    net = Twice().eval()
    graph = trace(net, EXAMPLE)
    plan = Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable})
    small = apply(net, graph, plan, EXAMPLE)
    sliced = copy.deepcopy(small.state_dict())
    done = reconstruct(small, net, graph, plan, data())
    changed = {n for n, value in small.state_dict().items() if not torch.equal(value, sliced[n])}
    assert changed == {"last.weight", "last.bias"} and done.layers == 1


def test_model_of_one_batch_size_is_left_as_it_is():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.norm, self.head = (
                nn.Conv2d(3, 8, 3),
                nn.BatchNorm2d(8),
                nn.Linear(8, 2),
            )

        def forward(self, x):
            assert len(x) == 1, "one at a time"
            return self.head(self.norm(self.layer(x)).mean((2, 3)))

    net = One().eval()
    small, graph, plan = pruned(net, {"layer": (0, 1, 2)})
    before = copy.deepcopy(small.state_dict())
    done = reconstruct(small, net, graph, plan, data())
    assert "does not take 64 samples at once" in done.note and done.layers == 0
    assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())


class Stateful(Net):
    """Keeps more than tensors in its state."""

    def get_extra_state(self):
        return {"version": 2}

    def set_extra_state(self, state):
        assert state == {"version": 2}


@pytest.mark.parametrize("kept", [tuple(range(8)), ()])
def test_a_state_that_holds_more_than_tensors(kept):
    """Both where the fitted weights are kept and where the old ones are put back."""
    torch.manual_seed(0)
    net = Stateful().eval()
    small, graph, plan = pruned(net, {"one": kept or tuple(range(16))})
    done = reconstruct(small, net, graph, plan, data())
    assert (done.layers > 0) == bool(kept)


def test_an_error_of_the_fitting_is_told_as_that(monkeypatch):
    net = with_copies()
    small, graph, plan = pruned(net, {"one": tuple(range(8))})
    before = copy.deepcopy(small.state_dict())
    monkeypatch.setattr(least_squares, "_solve", lambda *_: torch.linalg.cholesky(-torch.eye(2)))
    done = reconstruct(small, net, graph, plan, data())
    assert done.note.startswith("the least squares of a layer have no solution") and not done.layers
    assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())
    monkeypatch.setattr(least_squares, "_solve", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        reconstruct(small, net, graph, plan, data())


def test_too_few_samples():
    net = with_copies()
    small, graph, plan = pruned(net, {"one": tuple(range(8))})
    before = copy.deepcopy(small.state_dict())
    for few in ([], data(8, batch=8)):
        done = reconstruct(small, net, graph, plan, few)
        assert "too few" in done.note
    assert all(torch.equal(v, before[n]) for n, v in small.state_dict().items())


def test_weights_stay_short_for_training_where_no_batchnorm_follows():
    torch.manual_seed(2)
    net = Net(24)
    with torch.no_grad():  # channels 6 to 11 are copies, which the classifier counts twice
        net.two.weight[6:] = net.two.weight[:6]
        net.head.weight[:, 6:] = net.head.weight[:, :6]
    reestimate_batchnorm(net, data(256, seed=3))
    net.eval()
    sliced, graph, plan = pruned(net, {"one": tuple(range(0, 24, 2)), "two": tuple(range(6))})
    plain, close, short = (copy.deepcopy(sliced) for _ in range(3))
    reestimate_batchnorm(plain, data(128))
    reconstruct(close, net, graph, plan, data(128))
    assert reconstruct(short, net, graph, plan, data(128), trained=True).layers >= 2
    before = sliced.head.weight.norm()
    assert close.head.weight.norm() > LONGEST * before  # else there is nothing to see
    assert before < short.head.weight.norm() <= LONGEST * before * 1.0001
    for name in ("one.weight", "two.weight", "norm2.running_var"):
        assert torch.equal(close.state_dict()[name], short.state_dict()[name]), name
    fresh = data(256, seed=5)
    errors = [apart(one, net, fresh) for one in (close, short, plain)]
    assert errors == sorted(errors)


def test_only_the_last_layers_stay_short():
    """In a network without BatchNorm all other layers are fitted as closely as without training."""
    torch.manual_seed(3)
    layers = nn.Linear(4, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 3)
    net = nn.Sequential(*layers).eval()
    sliced, graph, plan = pruned(net, {"0": range(12), "2": range(8)}, example=EXAMPLE_ROW)
    close, short = copy.deepcopy(sliced), copy.deepcopy(sliced)
    reconstruct(close, net, graph, plan, data(256, shape=(4,)))
    reconstruct(short, net, graph, plan, data(256, shape=(4,)), trained=True)
    assert torch.equal(close[2].weight, short[2].weight)
    assert close[2].weight.norm() > LONGEST * sliced[2].weight.norm()
    assert short[4].weight.norm() <= LONGEST * sliced[4].weight.norm() < close[4].weight.norm()


class Heads(nn.Module):
    """A residual sum, from which two heads follow, one of them of two layers."""

    def __init__(self):
        super().__init__()
        self.stem, self.branch = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.LayerNorm(8)
        self.one, self.deep, self.deeper = nn.Linear(8, 2), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        x = self.norm((x + self.branch(x).relu()).flatten(2).mean(2))
        return self.one(x).softmax(1), {"deep": self.deeper(self.deep(x).relu())}


def test_last_layers_are_those_that_no_layer_follows():
    assert last_weights(trace(Heads().eval(), EXAMPLE).recording) == {
        "one.weight", "one.bias", "deeper.weight", "deeper.bias",
    }  # fmt: skip
    headless = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()).eval()
    assert last_weights(trace(headless, EXAMPLE).recording) == {"0.weight", "0.bias"}


def test_short_weights_gain_what_they_can():
    """Two inputs that are nearly the same: the best weights are long and cancel each other."""
    dice = torch.Generator().manual_seed(0)
    one = torch.randn(600, 1, 1, generator=dice)
    inputs = torch.cat([one, one + 0.05 * torch.randn(600, 1, 1, generator=dice), 0 * one + 1], 2)
    weights = torch.tensor([[[1.0], [1.0]]], dtype=torch.float64)  # the bias is not held to it
    missing = (inputs.double() @ torch.tensor([[[9.0], [-8.0], [50.0]]], dtype=torch.float64))[
        ..., 0
    ]
    fitted = torch.arange(600) % 2 == 0
    args = inputs, missing[..., None].float(), fitted
    free, short = correction(*args, 1), correction(*args, 1, weights)
    assert (weights + free[:, :2]).norm() > 3 * weights.norm()
    assert (weights + short[:, :2]).norm() <= LONGEST * weights.norm()
    assert free[0, 2].item() == pytest.approx(50, abs=0.1)
    assert short[0, 2].item() == pytest.approx(50, abs=0.1)
    left = (missing[..., None] - inputs.double() @ short).square().mean()
    assert left < 0.8 * missing.var()
    assert torch.equal(correction(*args, 1, torch.zeros(1, 2, 1)), free)  # of no length: free


def test_correction_is_the_ridge_regression_of_its_closed_form():
    dice = torch.Generator().manual_seed(0)
    inputs = torch.randn(400, 2, 5, generator=dice)
    truth = torch.randn(2, 5, 3, generator=dice)
    missing = torch.einsum("rgd,gdo->rgo", inputs, truth)
    found = correction(inputs, missing, torch.arange(400) % 2 == 0)
    for group in range(2):
        a, b = inputs[:, group].double().numpy(), missing[:, group].double().numpy()
        ridge = 1e-3 * np.square(a).sum(0).mean()  # the smallest of those tried
        exact = np.linalg.solve(a.T @ a + ridge * np.eye(5), a.T @ b)
        np.testing.assert_allclose(found[group].numpy(), exact, rtol=1e-4, atol=1e-6)


def test_noise_is_not_fitted():
    dice = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 1, 40, generator=dice)
    missing = torch.randn(60, 1, 20, generator=dice)
    assert correction(inputs, missing, torch.arange(60) % 2 == 0) is None


def test_constant_and_empty_inputs_are_solved():
    inputs = torch.zeros(40, 1, 3)
    inputs[:, 0, 0] = 1.0  # one input is constant, two are dead
    found = correction(inputs, torch.full((40, 1, 2), 3.0), torch.arange(40) % 2 == 0)
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[0, 0], torch.full((2,), 3.0).double(), rtol=2e-2, atol=0)
    assert (found[0, 1:] == 0).all()


@pytest.mark.parametrize(
    ("shape", "made", "kernel", "more"),
    [
        ((6, 9), 8, (3,), {"padding": 1}),
        ((6, 9, 7), 8, (3, 2), {"padding": (1, 0), "stride": (2, 1)}),
        ((6, 9, 11), 12, (3, 3), {"groups": 3, "dilation": 2, "padding": 2}),
        ((6, 8, 8), 12, (5, 5), {"groups": 6, "padding": 2, "stride": 2}),
        ((4, 5, 6, 7), 6, (2, 3, 1), {"groups": 2, "padding": (1, 1, 0)}),
    ],
)
def test_rows_times_weights_are_the_outputs_of_a_convolution(shape, made, kernel, more):
    dice = torch.Generator().manual_seed(0)
    groups = more.get("groups", 1)
    x = torch.randn(5, *shape, generator=dice)
    weight = torch.randn(made, shape[0] // groups, *kernel, generator=dice)
    sides = len(kernel)
    result = (functional.conv1d, functional.conv2d, functional.conv3d)[sides - 1](x, weight, **more)

    def each(name, default):
        value = more.get(name, default)
        return [value] * sides if isinstance(value, int) else list(value)

    window = [each("stride", 1), each("padding", 0), each("dilation", 1)]
    args = (x, weight, None, *window, False, [0] * sides, groups)
    call = contraction(torch.ops.aten.convolution.default, args)
    positions = torch.randperm(result[0, 0].numel(), generator=dice)[:7]
    rows = call.rows_in(5, positions)
    again = torch.einsum("npgd,gdo->npgo", rows.double(), call.matrices()).flatten(2)
    torch.testing.assert_close(again.float(), call.rows_out(result, 5, positions))
    before = weight.clone()
    change = torch.randn(groups, rows.shape[-1], made // groups, generator=dice)
    call.add(change.double())
    torch.testing.assert_close(
        weight - before, change.transpose(1, 2).flatten(0, 1).reshape(weight.shape)
    )
