"""Properties that must hold exactly for every network, checked on random ones."""

import copy
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

from .random_nets import network
from .zeroed import zeroed

SEEDS = st.integers(0, 10_000)
DEPTHS = st.integers(1, 5)
QUICK = settings(max_examples=25, deadline=None, derandomize=True)


def random_plan(graph, seed, least=1):
    """Random channels of every prunable axis, tied axes alike in number."""
    rng = random.Random(seed)
    shares = {name: share for tie in graph.ties for share in [rng.random()] for name in tie}
    kept = {}
    for axis in graph.prunable:
        share = shares.get(axis.name, rng.random())
        count = max(min(least, axis.size), round(axis.size * share))
        kept[axis.name] = tuple(sorted(rng.sample(range(axis.size), count)))
    return Plan(kept)


def consumes(member):
    return member.role == "in"


@given(seed=SEEDS, depth=DEPTHS)
@QUICK
def test_pruned_model_equals_original_with_the_consumers_zeroed(seed, depth):
    model, x = network(seed, depth), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    pruned = apply(model, graph, plan)
    expected = zeroed(model, graph, plan, consumes)(x)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-9, atol=1e-9)
    assert sum(p.numel() for p in pruned.parameters()) < sum(p.numel() for p in model.parameters())


@given(seed=SEEDS, depth=DEPTHS)
@QUICK
def test_formulas_equal_the_shapes_and_counts_of_the_pruned_model(seed, depth):
    model, x = network(seed, depth), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x)
    plan = random_plan(graph, seed + 1)
    pruned = apply(model, graph, plan)
    stored = {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}
    assert graph.shapes(plan.counts) == {name: tuple(t.shape) for name, t in stored.items()}
    assert graph.params(plan.counts) == sum(p.numel() for p in pruned.parameters())
    again = trace(pruned, x)
    assert graph.macs(plan.counts) == again.macs()
    assert again.macs() == counted_macs(pruned, x)


def counted_macs(model, x):
    """Multiply-accumulates counted by hooks on real tensors, one formula per layer type."""
    total = 0

    def convolution(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.weight[0].numel()

    def linear(layer, inputs, output):
        nonlocal total
        total += output.numel() * layer.in_features

    kinds = {nn.Conv2d: convolution, nn.Linear: linear}
    handles = [m.register_forward_hook(kinds[type(m)]) for m in model.modules() if type(m) in kinds]
    with torch.no_grad():
        model(x)
    for handle in handles:
        handle.remove()
    return total


@given(seed=SEEDS, depth=DEPTHS)
@QUICK
def test_pruning_in_two_steps_equals_pruning_once(seed, depth):
    model, x = network(seed, depth), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x)
    once = random_plan(graph, seed, least=2)  # an axis of one channel is no axis any more
    first = Plan({n: k for i, (n, k) in enumerate(once.kept.items()) if in_first(graph, n, i)})
    half = apply(model, graph, first)
    second_graph = trace(half, x)
    second = Plan({n: k for n, k in once.kept.items() if n not in first.kept})
    both = apply(half, second_graph, second)
    torch.testing.assert_close(both(x), apply(model, graph, once)(x), rtol=1e-9, atol=1e-9)


def in_first(graph, name, number):
    """Every second axis, tied ones together."""
    tie = graph[name].tie
    return (number if tie is None else tie) % 2 == 0


@given(seed=SEEDS, depth=DEPTHS)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_removing_nothing_changes_nothing_in_either_form(seed, depth):
    model, x = network(seed, depth), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x)
    torch.testing.assert_close(apply(model, graph, Plan({}))(x), model(x), rtol=0, atol=0)
    captured = capture(copy.deepcopy(model), model, graph, Plan({}))
    torch.testing.assert_close(captured(x), model(x), rtol=1e-12, atol=1e-12)
    assert set(captured.state_dict()) == set(model.state_dict())


@given(seed=SEEDS, depth=DEPTHS)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_captured_form_computes_what_the_sliced_copy_computes(seed, depth):
    model, x = network(seed, depth), torch.randn(2, 3, 6, 6).double()
    graph = trace(model, x)
    plan = random_plan(graph, seed)
    pruned = apply(model, graph, plan)
    captured = capture(copy.deepcopy(pruned), model, graph, plan)
    torch.testing.assert_close(captured(x), pruned(x), rtol=1e-12, atol=1e-12)
    wider = torch.randn(5, 3, 6, 6).double()
    torch.testing.assert_close(captured(wider), pruned(wider), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_original_is_untouched_by_tracing_and_pruning(seed):
    model = network(seed, 3).train()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    graph = trace(model, torch.randn(2, 3, 6, 6).double())
    apply(model, graph, random_plan(graph, seed))
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
