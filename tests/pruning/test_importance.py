"""Importance of groups: hand counts, reductions, normalisers, and what each needs first."""

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp
from prune2deploy.errors import ConfigError

from .nets import Res

X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
ALL = (
    "ActivationImportance", "BNScaleImportance", "FPGMImportance", "GroupHessianImportance",
    "GroupMagnitudeImportance", "GroupTaylorImportance", "HessianImportance", "LAMPImportance",
    "MagnitudeImportance", "OBDCImportance", "RandomImportance", "TaylorImportance",
)  # fmt: skip


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Res().eval()
    for parameter in net.bn1.parameters():
        nn.init.uniform_(parameter)
    return net


@pytest.fixture
def group(model):
    return inner(model)


def inner(model, idxs=range(16)):
    graph = tp.DependencyGraph().build_dependency(model, X)
    return graph.get_pruning_group(model.layer1[0].conv1, tp.prune_conv_out_channels, idxs)


def rows(model):
    """The three layers of the inner group, one row per channel."""
    block = model.layer1[0]
    return (
        block.conv1.weight.detach().flatten(1),
        block.bn1.weight.detach()[:, None],
        block.conv2.weight.detach().transpose(0, 1).flatten(1),
    )


@pytest.mark.parametrize("p", [1, 2])
def test_magnitude_by_hand(model, group, p):
    per_layer = torch.stack([(r.abs() ** p).sum(1) for r in rows(model)])
    made = tp.importance.GroupMagnitudeImportance
    torch.testing.assert_close(made(p, normalizer=None)(group), per_layer.mean(0))
    scaled = made(p)(group)
    torch.testing.assert_close(scaled, per_layer.mean(0) / per_layer.mean(0).mean())
    torch.testing.assert_close(made(p, group_reduction=None)(group), per_layer)


@pytest.mark.parametrize(
    ("reduction", "by_hand"),
    [
        ("sum", lambda s: s.sum(0)), ("max", lambda s: s.amax(0)), ("prod", lambda s: s.prod(0)),
        ("first", lambda s: s[0]), ("gate", lambda s: s[-1]), ("mean", lambda s: s.mean(0)),
    ],
)  # fmt: skip
def test_reductions_over_layers(model, group, reduction, by_hand):
    importance = tp.importance.MagnitudeImportance(2, reduction, None)
    layers = torch.stack([(r**2).sum(1) for r in rows(model)])
    torch.testing.assert_close(importance(group), by_hand(layers))


@pytest.mark.parametrize(
    ("normalizer", "measure", "value"),
    [
        ("sum", torch.sum, 1), ("mean", torch.mean, 1), ("max", torch.max, 1),
        ("standarization", torch.min, 0), ("standarization", torch.max, 1),
        ("gaussian", torch.mean, 0), ("lamp", torch.max, 1),
        ("sentinel_0.5", lambda s: s.sort().values[8], 1), (lambda s: s + 7, torch.numel, 16),
    ],
)  # fmt: skip
def test_normalisers_scale_and_keep_the_order(group, normalizer, measure, value):
    scores = tp.importance.MagnitudeImportance(2, normalizer=normalizer)(group)
    raw = tp.importance.MagnitudeImportance(2, normalizer=None)(group)
    assert float(measure(scores)) == pytest.approx(value, abs=1e-5)
    assert torch.equal(scores.argsort(), raw.argsort())


def test_a_partial_group_is_scored_where_it_lies(model, group):
    importance = tp.importance.MagnitudeImportance(2, normalizer=None)
    whole = importance(group)
    torch.testing.assert_close(importance(inner(model, [2, 6, 9])), whole[[2, 6, 9]])


def test_biases_count_when_asked(model):
    graph = tp.DependencyGraph().build_dependency(model, X)
    group = graph.get_pruning_group(model.layer2[0], tp.prune_conv_out_channels, range(32))
    made = tp.importance.MagnitudeImportance
    without, with_bias = (made(2, "sum", None, bias=b)(group) for b in (False, True))
    torch.testing.assert_close(with_bias - without, model.layer2[0].bias.detach() ** 2)


def test_target_types_choose_layers(model, group):
    importance = tp.importance.MagnitudeImportance(
        1, normalizer=None, target_types=[nn.BatchNorm2d]
    )
    torch.testing.assert_close(importance(group), model.layer1[0].bn1.weight.detach().abs())


def test_scales_of_batch_normalisation_and_none_without_it(model):
    graph = tp.DependencyGraph().build_dependency(model, X)
    stem = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, range(16))
    norms = [model.bn1, model.layer1[0].bn2, model.layer1[1].bn2]
    wanted = torch.stack([n.weight.detach().abs() for n in norms]).mean(0)
    importance = tp.importance.BNScaleImportance(normalizer=None)
    torch.testing.assert_close(importance(stem), wanted)
    wide = graph.get_pruning_group(model.layer2[0], tp.prune_conv_out_channels, range(32))
    assert importance(wide) is None


def test_a_flattened_picture_adds_up_per_channel():
    net = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(4 * 64, 2))
    graph = tp.DependencyGraph().build_dependency(net, X)
    group = graph.get_pruning_group(net[0], tp.prune_conv_out_channels, range(4))
    got = tp.importance.MagnitudeImportance(1, "gate", None)(group)
    wanted = net[2].weight.detach().abs().sum(0).view(4, 64).sum(1)
    torch.testing.assert_close(got, wanted)


def backward(model):
    model.zero_grad()
    nn.functional.cross_entropy(model(X), torch.tensor([1, 2])).backward()


def test_taylor_by_hand(model, group):
    backward(model)
    block = model.layer1[0]
    parts = [
        (block.conv1.weight * block.conv1.weight.grad).abs().sum((1, 2, 3)),
        (block.bn1.weight * block.bn1.weight.grad).abs(),
        (block.conv2.weight * block.conv2.weight.grad).abs().sum((0, 2, 3)),
    ]
    importance = tp.importance.GroupTaylorImportance(normalizer=None)
    torch.testing.assert_close(importance(group), torch.stack(parts).mean(0).detach())
    joint = tp.importance.TaylorImportance("first", None, multivariable=True)(group)
    wanted = (block.conv1.weight * block.conv1.weight.grad).sum((1, 2, 3)).abs()
    torch.testing.assert_close(joint, wanted.detach())


def test_hessian_takes_the_mean_of_squares_over_passes(model, group):
    importance = tp.importance.GroupHessianImportance("first", None)
    weight = model.layer1[0].conv1.weight
    squares = 0
    for _ in range(2):
        backward(model)
        squares = squares + weight.grad**2
        importance.accumulate_grad(model)
    wanted = (weight**2 * squares / 2).sum((1, 2, 3)).detach()
    torch.testing.assert_close(importance(group), wanted)
    importance.zero_grad()
    backward(model)
    torch.testing.assert_close(
        importance(group), (weight**2 * weight.grad**2).sum((1, 2, 3)).detach()
    )


def test_obdc_squares_the_loss_change_of_whole_channels(model, group):
    importance = tp.importance.OBDCImportance("first", None, num_classes=10)
    importance._prepare_model(model, None)
    backward(model)
    importance.step()
    weight = model.layer1[0].conv1.weight
    wanted = (weight * weight.grad).sum((1, 2, 3)) ** 2 / 2
    torch.testing.assert_close(importance(group), wanted.detach())


def test_activations_are_what_the_next_layer_reads(model, group):
    importance = tp.importance.ActivationImportance(normalizer=None)
    seen = []
    handle = model.layer1[0].conv2.register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    with importance.compute_importance(model), torch.no_grad():
        model(X)
    handle.remove()
    torch.testing.assert_close(importance(group), seen[0].abs().mean((0, 2, 3)))
    assert not model.layer1[0].conv2._forward_pre_hooks


@pytest.mark.parametrize("name", ["GroupTaylorImportance", "GroupHessianImportance",
                                  "OBDCImportance", "ActivationImportance"])  # fmt: skip
def test_what_has_to_be_done_first_is_said(group, name):
    with pytest.raises(ConfigError, match=r"call|run the model"):
        getattr(tp.importance, name)()(group)


@pytest.mark.parametrize("name", ALL)
def test_every_importance_prunes(model, name):
    importance = getattr(tp.importance, name)()
    pruner = tp.pruner.BasePruner(model, X, importance=importance)
    backward(model)
    if name == "OBDCImportance":
        importance._prepare_model(model, pruner)
        importance.step()
    if name == "ActivationImportance":
        with importance.compute_importance(model):
            model(X)
    pruner.step()
    assert model.conv1.out_channels == 8 and model(X).shape == (2, 10)


def test_unknown_reductions_and_normalisers_are_refused(group):
    with pytest.raises(ConfigError, match="choose one of sum, mean"):
        tp.importance.MagnitudeImportance(group_reduction="median")
    with pytest.raises(ConfigError, match="sentinel_FRACTION"):
        tp.importance.MagnitudeImportance(normalizer="median")(group)
