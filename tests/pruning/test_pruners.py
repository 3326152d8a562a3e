"""Pruners: how many channels go, which, in what steps, and what is left alone."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import prune2deploy.pruning as tp
from prune2deploy.errors import ConfigError
from prune2deploy.graph import trace
from prune2deploy.pruning.ranking import Record, alone, lowest, together

from .nets import Attention, Plain, Res, Transformer, shapes

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Res().eval()


def pruned(model, x=X, importance=MAGNITUDE, kind=tp.pruner.BasePruner, **options):
    pruner = kind(model, x, importance=importance, **options)
    pruner.step()
    return pruner


def widths(model):
    return model.conv1.out_channels, model.layer1[0].conv1.out_channels, model.fc.in_features


def test_half_of_every_group_goes_and_the_classifier_stays(model):
    pruned(model, pruning_ratio=0.5, ignored_layers=[model.fc], round_to=8)
    assert widths(model) == (8, 8, 16) and model.fc.out_features == 10
    assert model(torch.randn(5, 3, 8, 8)).shape == (5, 10)


def test_a_classifier_is_left_alone_without_being_ignored(model):
    pruned(model)
    assert model.fc.out_features == 10


def test_counts_are_those_of_a_hand_count(model):
    macs, params = tp.utils.count_ops_and_params(model, X)
    convs = 64 * (27 * 16 + 4 * 9 * 16 * 16) + 16 * 9 * 16 * 32
    assert macs == convs + 32 * 10
    assert params == sum(p.numel() for p in model.parameters())
    batch = tp.utils.count_ops_and_params(model, X.expand(4, -1, -1, -1))
    assert batch == (macs, params)
    total, _, by_module, own = tp.utils.count_ops_and_params(model, X, layer_wise=True)
    assert by_module[model.conv1] == 64 * 27 * 16 and sum(by_module.values()) == total
    assert own[model.fc] == 330 and sum(own.values()) == params


def test_functional_products_and_attention_are_counted():
    model = Attention(16, 4)
    x = torch.randn(2, 5, 16)
    macs, _ = tp.utils.count_ops_and_params(model, x)
    assert macs == 5 * 16 * 48 + 2 * (4 * 5 * 5 * 4) + 5 * 16 * 16


def test_the_least_important_channels_go(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight[4:] *= 0.01
        model.layer1[0].conv2.weight[:, 4:] *= 0.01
    kept = model.layer1[0].conv1.weight.detach()[:4].clone()
    pruned(model, pruning_ratio=0.75, ignored_layers=[model.conv1])
    assert torch.equal(model.layer1[0].conv1.weight, kept)


def test_ratios_of_modules_and_of_what_is_inside_them(model):
    pruned(model, pruning_ratio=0.5, pruning_ratio_dict={model.layer1: 0.25, model.layer2: 0.0})
    # the stem is coupled to layer1's second convolutions: it takes their ratio
    assert widths(model) == (12, 12, 32)


def test_ignored_layers_keep_their_outputs(model):
    pruned(model, ignored_layers=[model.layer1[0].conv1, model.layer2])
    assert widths(model) == (8, 16, 32)


def test_an_ignored_parameter_keeps_its_group():
    model = Transformer()
    x = torch.randn(1, 3, 6)
    with pytest.warns(UserWarning, match="constants"):
        pruned(model, x, ignored_layers=[model.token])
    assert model.token.shape[-1] == 16 and model.mlp[0].out_features == 16


def test_no_group_loses_more_than_the_ceiling(model):
    pruned(model, pruning_ratio=0.9, max_pruning_ratio=0.25)
    assert widths(model) == (12, 12, 24)


def test_global_ranking_removes_the_weak_layer_and_spares_the_strong(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight *= 0.01
        model.layer1[0].bn1.weight *= 0.01
        model.layer1[0].conv2.weight *= 0.01
    names = [axis.name for axis in trace(model, X).prunable]
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    pruner = pruned(model, importance=importance, global_pruning=True, pruning_ratio=0.2)
    after = sum(pruner.DG.live.graph[name].size for name in names)
    assert model.layer1[0].conv1.out_channels == 1  # its last channel is never taken
    assert after == int((16 + 16 + 16 + 32) * 0.8)


def test_a_tuple_of_modules_shares_one_ranking(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight *= 0.01
        model.layer1[0].bn1.weight *= 0.01
        model.layer1[0].conv2.weight *= 0.01
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    key = (model.layer1[0].conv1, model.layer1[1].conv1)
    pruned(
        model, importance=importance, global_pruning=True, pruning_ratio=0.0,
        pruning_ratio_dict={key: 0.25},
    )  # fmt: skip
    assert model.layer1[0].conv1.out_channels == 8 and model.layer1[1].conv1.out_channels == 16
    assert model.layer2[0].out_channels == 32


def test_isomorphic_ranks_groups_of_the_same_build_together(model):
    with torch.no_grad():
        for part in (model.layer1[0].conv1, model.layer1[0].bn1, model.layer1[0].conv2):
            part.weight *= 0.01
    importance = tp.importance.GroupMagnitudeImportance(p=2, normalizer=None)
    pruned(model, importance=importance, global_pruning=True, isomorphic=True, pruning_ratio=0.25)
    # both inner convolutions compete; stem and widening layer are each alone of their kind
    assert model.layer1[0].conv1.out_channels == 8 and model.layer1[1].conv1.out_channels == 16
    assert model.conv1.out_channels == 12 and model.fc.in_features == 24


def test_steps_reach_the_ratio_and_then_stop(model):
    pruner = tp.pruner.MetaPruner(model, X, importance=MAGNITUDE, iterative_steps=3)
    seen = []
    for _ in range(3):
        pruner.step()
        seen.append(model.conv1.out_channels)
        assert model(X).shape == (1, 10)
    assert seen == [13, 10, 8] and pruner.current_ratio == 0.5
    with pytest.warns(UserWarning, match="step 4 of 3"):
        pruner.step()
    assert model.conv1.out_channels == 8


def test_interactive_steps_prune_what_the_caller_takes(model):
    pruner = tp.pruner.BasePruner(model, X, importance=MAGNITUDE, iterative_steps=2)
    for _ in range(2):
        for group in pruner.step(interactive=True):
            dep, idxs = group[0]
            assert idxs == sorted(idxs) and dep.handler.__name__ == "prune_out_channels"
            if dep.target.module is model.conv1:
                continue
            if dep.target.module is model.layer2[0]:
                group.prune(idxs=[0])
            else:
                group.prune()
        assert model(X).shape == (1, 10)
    assert widths(model) == (16, 8, 30)


def test_one_pruner_leaves_no_state_for_the_next():
    """Heads and groups given to one pruner must not be known to another."""
    first = Attention()
    tp.pruner.BasePruner(
        first, torch.randn(1, 3, 16), importance=MAGNITUDE, num_heads={first.qkv: 4},
        out_channel_groups={first.proj: 4}, in_channel_groups={first.proj: 2},
        pruning_ratio_dict={first.qkv: 0.9},
    )  # fmt: skip
    second = tp.pruner.BasePruner(Res(), X, importance=MAGNITUDE)
    assert not second.num_heads and not second.options.out_channel_groups
    assert not second.options.in_channel_groups and not second._scopes
    assert not second.DG.customized


def test_the_caller_s_dictionaries_are_not_changed(model):
    given = {model.conv1: 2}
    tp.pruner.BasePruner(model, X, MAGNITUDE, out_channel_groups=given, num_heads=given).step()
    assert given == {model.conv1: 2}


def test_groups_that_the_user_names_lose_equally_many(model):
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    weight = model.layer1[0].conv1.weight
    with torch.no_grad():
        weight[:8] *= 0.01
    marks = torch.arange(16.0)
    model.layer1[0].bn1.running_mean.copy_(marks)
    pruned(model, importance=importance, out_channel_groups={model.layer1[0].conv1: 2})
    left = model.layer1[0].bn1.running_mean
    assert (left < 8).sum() == (left >= 8).sum() == 4
    assert torch.equal(left[:4] + 8, left[4:])


def test_heads_shrink_in_width_by_default():
    model = Transformer(16, 4).eval()
    pruner = pruned(model, torch.randn(2, 3, 6), num_heads={model.attention.qkv: 4})
    sizes = heads_of(pruner)  # of q, k and v: heads, and channels of each
    assert sizes == [2, 3, 4] and model.attention.qkv.out_features == 3 * 4 * 2
    assert "forward" not in vars(model)  # c // heads is still right: the code runs as it is


def test_whole_heads_go_when_that_is_asked_for():
    model = Transformer(16, 4).eval()
    with pytest.warns(UserWarning, match="constants"):
        pruner = pruned(
            model, torch.randn(2, 3, 6), num_heads={model.attention.qkv: 4},
            prune_num_heads=True, head_pruning_ratio=0.5,
        )  # fmt: skip
    assert heads_of(pruner) == [2, 2, 3] and model.attention.qkv.out_features == 3 * 2 * 2
    assert pruner.num_heads == {model.attention.qkv: 2}
    assert model(torch.randn(3, 3, 6)).shape == (3, 5)


@pytest.mark.filterwarnings("ignore:the code of Transformer holds widths")
@pytest.mark.parametrize("interactive", [False, True])
def test_the_heads_that_are_left_may_be_written_to_the_modules(interactive):
    model = Transformer(16, 4).eval()
    qkv = model.attention.qkv
    pruner = tp.pruner.BasePruner(
        model, torch.randn(2, 3, 6), MAGNITUDE, num_heads={qkv: 4}, prune_num_heads=True,
        head_pruning_ratio=0.5, iterative_steps=2,
    )  # fmt: skip
    for left in (3, 2):
        for group in pruner.step(interactive=interactive) or ():
            group.prune()
        assert pruner.num_heads == {qkv: left}
        model.attention.heads = pruner.num_heads[qkv]
        assert model(torch.randn(3, 3, 6)).shape == (3, 5)


def test_queries_that_share_keys_count_their_own_heads():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)
            self.out = nn.Linear(16, 16)

        def forward(self, x):
            q = self.q(x).unflatten(-1, (2, 2, -1)).permute(0, 2, 3, 1, 4)
            k, v = (p(x).unflatten(-1, (2, 1, -1)).permute(0, 2, 3, 1, 4) for p in (self.k, self.v))
            y = F.softmax(q @ k.transpose(-1, -2), -1) @ v
            return self.out(y.permute(0, 3, 1, 2, 4).flatten(2))

    model = nn.Sequential(nn.Linear(6, 16), Shared(), nn.Linear(16, 3)).eval()
    heads = {model[1].q: 4, model[1].k: 2, model[1].v: 2}
    with pytest.warns(UserWarning, match="constants"):
        pruner = pruned(model, torch.randn(2, 3, 6), num_heads=heads, prune_num_heads=True,
                        head_pruning_ratio=0.5, pruning_ratio=0.0)  # fmt: skip
    left = pruner.num_heads
    assert (left[model[1].q], left[model[1].k], left[model[1].v]) == (1, 1, 1)


def heads_of(pruner):
    axes = pruner.DG.live.graph.axes
    return sorted(axis.size for axis in axes if axis.name.startswith("attention.qkv"))


def test_head_widths_stay_when_that_is_asked_for():
    model = Transformer(16, 4).eval()
    with pytest.warns(UserWarning, match="constants"):
        pruned(model, torch.randn(2, 3, 6), num_heads={model.attention.qkv: 4},
               prune_head_dims=False)  # fmt: skip
    assert model.attention.qkv.out_features == 48 and model.attention.qkv.in_features == 8


def test_grouped_convolutions_keep_their_groups():
    model = Plain(nn.Conv2d(8, 16, 3, groups=4, padding=1))
    model.last = nn.Conv2d(16, 4, 1)
    pruned(model.eval())
    assert model.between.groups == 4 and model.between.weight.shape == (8, 1, 3, 3)
    assert model(X).shape == (1, 4, 8, 8)


def test_only_groups_that_begin_with_the_given_types(model):
    pruned(model, root_module_types=[nn.Linear])
    assert widths(model) == (16, 16, 32)


def test_a_layer_is_pruned_by_hand_by_ratio_or_by_indices(model):
    pruner = tp.pruner.BasePruner(model, X, importance=MAGNITUDE)
    pruner.manual_prune_width(model.layer1[0].conv1, tp.prune_conv_out_channels, 0.25)
    pruner.manual_prune_width(model.fc, tp.prune_linear_in_channels, [0, 1])
    assert widths(model) == (16, 12, 30)
    assert model(X).shape == (1, 10)


def test_the_history_of_a_pruner_prunes_a_fresh_model_alike():
    torch.manual_seed(0)
    model, x = Transformer().eval(), torch.randn(2, 3, 6)
    with pytest.warns(UserWarning, match="constants"):
        pruner = pruned(model, x, pruning_ratio_dict={model.attention.qkv: 0.25})
    fresh = Transformer().eval()
    again = tp.pruner.BasePruner(fresh, x, importance=MAGNITUDE)
    with pytest.warns(UserWarning, match="constants"):
        again.load_pruning_history(pruner.pruning_history())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


def test_models_that_take_more_than_one_call():
    class Dictionary(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Res()

        def forward(self, image, scale=1.0):
            return {"logits": self.net(image) * scale}

    for options in (
        {"example_inputs": {"image": X}},
        {"example_inputs": X, "forward_fn": lambda m, x: m(x, scale=2.0)["logits"].sum()},
        {"example_inputs": X, "output_transform": lambda out: out["logits"].sum()},
    ):
        model = Dictionary()
        tp.pruner.BasePruner(model, importance=MAGNITUDE, **options).step()
        assert model.net.conv1.out_channels == 8 and model.net.fc.out_features == 10


def test_an_importance_is_any_function_of_a_group(model):
    def last_ones(group):
        scores = []
        for dep, idxs in group:
            if dep.handler in [tp.prune_conv_out_channels, tp.prune_linear_out_channels]:
                scores.append(dep.target.module.weight.data[idxs].flatten(1).sum(1) * 0)
        return torch.stack(scores).mean(0) - torch.arange(float(len(group[0].idxs)))

    first = model.conv1.weight.detach()[:8].clone()
    pruned(model, importance=last_ones)
    assert torch.equal(model.conv1.weight, first)


def test_a_group_without_scores_is_left_alone(model):
    before = shapes(model)
    pruned(model, importance=lambda group: None)
    assert shapes(model) == before


@pytest.mark.parametrize(
    ("importance", "found"),
    [
        (lambda group: torch.ones(5), r"\(5,\)"),
        (tp.importance.GroupMagnitudeImportance(group_reduction=None), r"\(\d+, 16\)"),
    ],
)
def test_scores_that_are_not_one_per_position_are_refused(model, importance, found):
    before = shapes(model)
    pruner = tp.pruner.BasePruner(model, X, importance=importance)
    told = rf"scores of shape {found} for the group of 'conv1', expected \(16,\)"
    with pytest.raises(ConfigError, match=told):
        pruner.step()
    with pytest.raises(ConfigError, match=told):
        pruner.manual_prune_width(model.conv1, tp.prune_conv_out_channels, 0.5)
    assert shapes(model) == before


class Halved(nn.Module):
    """Equal halves of an embedding, to one of which a layer adds."""

    def __init__(self):
        super().__init__()
        self.table, self.more, self.head = nn.Embedding(9, 8), nn.Linear(3, 4), nn.Linear(8, 2)

    def forward(self, ids, x):
        a, b = self.table(ids).chunk(2, -1)
        return self.head(torch.cat([a + self.more(x), b], -1))


def test_halves_are_scored_by_whatever_layer_makes_them():
    torch.manual_seed(0)
    model, inputs = Halved(), (torch.tensor([1, 2]), torch.randn(2, 3))
    with torch.no_grad():
        model.table.weight[:, [5, 6]] *= 0.01
        model.head.weight[:, [5, 6]] *= 0.01
    wanted = model.table.weight[:, [4, 7]].clone()
    tp.pruner.BasePruner(model, inputs, MAGNITUDE, root_module_types=[nn.Linear]).step()
    assert torch.equal(model.table.weight[:, 2:], wanted)
    assert model(*inputs).shape == (2, 2)


@pytest.mark.parametrize("bad", [{"pruning_ratio": 1.5}, {"iterative_steps": 0}, {"round_to": -4}])
def test_settings_that_make_no_sense_are_refused(model, bad):
    with pytest.raises(ConfigError):
        tp.pruner.BasePruner(model, X, importance=MAGNITUDE, **bad)


@pytest.mark.parametrize("name", ["pruning_ratio_dict", "head_pruning_ratio_dict"])
def test_every_ratio_of_a_layer_lies_between_none_and_all(model, name):
    given = {name: {model.conv1: 1.5, model.layer2[0]: 0.5}}
    with pytest.raises(ConfigError, match=rf"{name} of Conv2d is 1\.5"):
        tp.pruner.BasePruner(model, X, importance=MAGNITUDE, **given)


def test_former_names_still_work(model):
    with pytest.warns(DeprecationWarning, match="now called pruning_ratio"):
        pruned(model, ch_sparsity=0.25)
    assert widths(model) == (12, 12, 24)


def test_a_former_name_may_be_given_zero(model):
    with pytest.warns(DeprecationWarning, match="now called"):
        pruned(model, ch_sparsity=0.0, ch_sparsity_dict={model.layer2: 0.5})
    assert widths(model) == (16, 16, 16)


def record(scores, ratio, **options):
    return Record(np.asarray(scores, dtype=float), len(scores), ratio, **options)


@pytest.mark.parametrize(
    ("size", "ratio", "step", "keep"),
    [
        (64, 0.5, 8, 32), (10, 0.9, 1, 1), (6, 0.5, 8, 6), (12, 0.5, 8, 8), (16, 0.99, 8, 8),
        (20, 0.5, 8, 8), (24, 0.5, 8, 16), (9, 0.1, 8, 8), (64, 0.3, 1, 44), (4, 1.0, 1, 1),
    ],
)  # fmt: skip
def test_rounding_goes_to_the_nearest_and_never_to_nothing(size, ratio, step, keep):
    assert alone(record(range(size), ratio, step=step)) == keep


def test_ties_in_score_do_not_take_everything():
    equal = [record(np.ones(8), 0.25), record(np.ones(8), 0.25)]
    assert sum(together(equal)) == 12
    assert lowest(np.ones(8), 2).tolist() == [0, 1]
