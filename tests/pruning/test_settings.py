"""Settings of pruners that are read in few places: each changes what it says."""

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp

from .nets import Attention, Plain, Res, Transformer

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
TOKENS = torch.randn(2, 3, 6, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Res().eval()


def pruned(model, x=X, **options):
    pruner = tp.pruner.BasePruner(model, x, importance=MAGNITUDE, **options)
    pruner.step()
    return pruner


class Merging(nn.Module):
    """Pixels of a square side by side as channels, as hierarchical transformers merge them."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.norm, self.reduction = nn.LayerNorm(4 * dim), nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x):
        x = x.permute(0, 2, 3, 1)
        corners = [x[:, row::2, column::2] for column in range(2) for row in range(2)]
        x = torch.cat(corners, -1)
        x = x.view(len(x), x.shape[1], x.shape[2], 4 * self.dim)
        return self.reduction(self.norm(x)).permute(0, 3, 1, 2)


class MergingPruner(tp.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        tp.prune_linear_out_channels(layer.reduction, idxs)
        return layer

    def prune_in_channels(self, layer, idxs):
        everywhere = [corner * layer.dim + idx for corner in range(4) for idx in idxs]
        tp.prune_linear_in_channels(layer.reduction, everywhere)
        tp.prune_layernorm_out_channels(layer.norm, everywhere)
        layer.dim -= len(idxs)
        return layer

    def get_out_channels(self, layer):
        return layer.reduction.out_features

    def get_in_channels(self, layer):
        return layer.dim


@pytest.mark.parametrize("by_type", [True, False])
def test_customised_pruners_keep_the_forward_of_their_layer(by_type):
    torch.manual_seed(0)
    model = Plain(Merging(8)).eval()
    model.last = nn.Conv2d(16, 4, 1)
    key = Merging if by_type else model.between
    pruned(
        model, customized_pruners={key: MergingPruner()},
        root_module_types=[nn.Conv2d, nn.Linear, Merging],
    )  # fmt: skip
    assert (model.between.dim, model.between.reduction.in_features) == (4, 16)
    assert model.first.out_channels == 4 and model.last.in_channels == 8
    assert "forward" not in vars(model) and model(X).shape == (1, 4, 4, 4)


def test_layer_types_can_be_ignored(model):
    model.head, model.fc = nn.Linear(16, 10), nn.Sequential(nn.Linear(32, 16), nn.ReLU())
    forward = model.forward
    model.forward = lambda x: model.head(forward(x))
    pruned(model, ignored_layers=[nn.Linear])
    assert model.fc[0].out_features == 16 and model.layer2[0].out_channels == 16
    graph = tp.DependencyGraph().build_dependency(model, X)
    roots = [group[0].dep.layer for group in graph.get_all_groups(ignored_layers=[nn.Conv2d])]
    assert roots == [model.fc[0]]


def test_inputs_that_form_groups_lose_equally_many_of_each(model):
    marks = torch.arange(16.0)
    model.layer1[0].bn1.running_mean.copy_(marks)
    with torch.no_grad():
        model.layer1[0].conv1.weight[:8] *= 0.01
    pruned(model, in_channel_groups={model.layer1[0].conv2: 4})
    left = model.layer1[0].bn1.running_mean
    assert [int(((left >= 4 * g) & (left < 4 * g + 4)).sum()) for g in range(4)] == [2] * 4


def test_a_schedule_of_one_s_own_sets_the_ratio_of_each_step(model):
    pruner = tp.pruner.BasePruner(
        model, X, importance=MAGNITUDE, iterative_steps=2, pruning_ratio=0.5,
        pruning_ratio_dict={model.layer2: 0.25},
        iterative_pruning_ratio_scheduler=lambda ratio, steps: [0, ratio / 4, ratio],
        max_pruning_ratio=0.4,
    )  # fmt: skip
    pruner.step()
    assert model.conv1.out_channels == 14 and pruner.get_target_pruning_ratio(model.conv1) == 0.125
    pruner.step()
    assert pruner.get_target_pruning_ratio(model.conv1) == 0.4
    assert pruner.get_target_pruning_ratio(model.layer2[0]) == 0.25
    assert model.conv1.out_channels == 10


def test_ratios_of_heads_are_those_of_their_module():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), Attention(16, 4), Attention(16, 4), nn.Linear(16, 3))
    with pytest.warns(UserWarning, match="constants"):
        pruner = pruned(
            model, TOKENS, prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.25,
            head_pruning_ratio_dict={model[1]: 0.5}, num_heads={model[1].qkv: 4, model[2].qkv: 4},
            ignored_layers=[model[0]],
        )  # fmt: skip
    assert pruner.get_target_head_pruning_ratio(model[1].qkv) == 0.5
    assert model[1].qkv.out_features == 3 * 2 * 4 and model[2].qkv.out_features == 3 * 3 * 4
    assert model(TOKENS).shape == (2, 3, 3)


def test_bare_parameters_may_be_announced_and_need_not_be():
    shapes = []
    for announced in (True, False):
        torch.manual_seed(0)
        model = Transformer().eval()
        given = [(model.token, 2)] if announced else None
        pruned(model, TOKENS, unwrapped_parameters=given)
        shapes.append({name: tuple(p.shape) for name, p in model.named_parameters()})
    assert shapes[0] == shapes[1] and shapes[0]["token"] == (1, 1, 8)
