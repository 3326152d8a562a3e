"""Settings of pruners that are read in few places: each changes what it says."""

import time

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp
from prune2deploy.errors import ConfigError

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


def test_options_may_be_given_in_order(model):
    tp.pruner.BasePruner(model, X, MAGNITUDE, False, 0.25).step()
    assert model.conv1.out_channels == 12
    sparse = tp.pruner.GroupNormPruner(model, X, MAGNITUDE, 1e-3, 2, True, 0.75)
    assert (sparse.reg, sparse.alpha, sparse.global_pruning) == (1e-3, 2, True)
    assert sparse.pruning_ratio == 0.75
    scales = tp.pruner.BNScalePruner(model, X, MAGNITUDE, 1e-3, True, False, 0.25)
    growing = tp.pruner.GrowingRegPruner(model, X, MAGNITUDE, 1e-3, 1e-2, False, 0.5)
    assert scales.group_lasso and scales.pruning_ratio == 0.25
    assert growing.delta_reg == 1e-2 and growing.pruning_ratio == 0.5


def test_options_are_attributes_of_the_pruner(model):
    heads = {model.conv1: 2}
    pruner = tp.pruner.BasePruner(
        model, X, MAGNITUDE, pruning_ratio_dict={model.layer2: 0.25}, iterative_steps=2,
        ignored_layers=[model.fc, model.bn1.bias], num_heads=heads,
    )  # fmt: skip
    assert (pruner.pruning_ratio, pruner.max_pruning_ratio, pruner.iterative_steps) == (0.5, 1.0, 2)
    assert pruner.pruning_ratio_dict == {model.layer2: 0.25}
    assert pruner.iterative_pruning_ratio_scheduler is tp.pruner.linear_scheduler
    assert pruner.head_pruning_ratio == 0 and pruner.head_pruning_ratio_dict is None
    assert pruner.prune_head_dims and not pruner.prune_num_heads and not pruner.isomorphic
    assert pruner.in_channel_groups == pruner.out_channel_groups == {}
    assert pruner.ignored_layers == [model.fc, model.bn1.bias]
    assert len(pruner.ignored_params) == 1 and pruner.init_num_heads == heads
    assert pruner.layer_init_out_ch[model.conv1] == 16 and pruner.layer_init_in_ch[model.fc] == 32
    with pytest.raises(AttributeError, match="no attribute 'pruning_rate'"):
        pruner.pruning_rate  # noqa: B018


def test_what_each_step_reads_anew_may_be_set_and_nothing_else(model):
    pruner = tp.pruner.BasePruner(model, X, MAGNITUDE, pruning_ratio=0.4)
    pruner.round_to = 8
    with pytest.raises(ConfigError, match="max_pruning_ratio is 3"):
        pruner.max_pruning_ratio = 3
    with pytest.raises(AttributeError, match="make another one"):
        pruner.pruning_ratio = 0.9
    pruner.step()
    assert model.conv1.out_channels == 8


def test_layer_types_and_schedules_have_their_names():
    assert isinstance(nn.ConvTranspose1d(1, 1, 1), tp.ops.TORCH_CONV)
    assert tp.utils.TORCH_CONV is tp.ops.TORCH_CONV and tp.ops.TORCH_MHA is nn.MultiheadAttention
    assert tp.pruner.algorithms.BasePruner is tp.pruner.BasePruner
    assert tp.pruner.algorithms.scheduler.linear_scheduler(0.5, 2) == [0, 0.25, 0.5]
    assert tp.utils.op_counter.count_ops_and_params is tp.utils.count_ops_and_params


def test_a_model_is_timed_by_itself():
    class Slow(nn.Module):
        calls = 0

        def forward(self, x, pause=0.002):
            time.sleep(pause)
            self.calls += 1
            return x

    model, x = Slow(), torch.randn(4, 3)
    mean, deviation = tp.utils.benchmark.measure_latency(model, x, repeat=5, warmup=2)
    assert model.calls == 7 and mean >= 2 and deviation >= 0
    options = {"repeat": 5, "warmup": 0, "run_fn": lambda net, given: net(given, pause=0.004)}
    assert 0 < tp.utils.benchmark.measure_fps(model, x, **options) <= 250
    assert 0 < tp.utils.benchmark.measure_throughput(model, x, **options) <= 1000
    with pytest.raises(ConfigError, match="CUDA"):
        tp.utils.benchmark.measure_memory(model, x)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_memory_of_a_pass_counts_weights_and_activations():
    model = nn.Sequential(nn.Linear(1024, 1024, bias=False)).cuda()
    used = tp.utils.benchmark.measure_memory(model, torch.randn(1024, 1024, device="cuda"))
    assert used >= 3 * 4 * 1024**2


class Rotated(nn.Module):
    """Attention whose queries and keys are turned by pairs of channels that lie side by side."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 32) for _ in range(3))
        self.out = nn.Linear(32, 16)
        self.register_buffer("speed", torch.rand(4))

    def turned(self, x):
        angle = torch.outer(torch.arange(x.shape[-2]), self.speed)
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = (a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos())
        return torch.stack(turned, -1).flatten(-2)

    def forward(self, x):
        q, k, v = (p(x).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(self.turned(q), self.turned(k), v)
        return self.out(y.transpose(1, 2).flatten(2))


@pytest.mark.filterwarnings("ignore:the code of")
@pytest.mark.parametrize("given", [True, False])
def test_the_width_of_heads_stays_when_that_is_asked_for(given):
    model = nn.Sequential(nn.Linear(6, 16), Rotated(), nn.Linear(16, 3)).eval()
    rotated = model[1]
    heads = dict.fromkeys((rotated.q, rotated.k, rotated.v), 4) if given else {}
    pruner = tp.pruner.BasePruner(
        model, torch.randn(2, 5, 6), tp.importance.MagnitudeImportance(), num_heads=heads,
        prune_head_dims=False, prune_num_heads=True, head_pruning_ratio=0.5,
    )  # fmt: skip
    pruner.step()
    assert [p.out_features for p in (rotated.q, rotated.k, rotated.v)] == [16] * 3
    assert rotated.speed.shape == (4,)
    assert model[0].out_features == 8
