"""Groups of a dependency graph: what they list, what pruning them leaves, what is refused."""

import copy
import io

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp
from prune2deploy.errors import PruneError

from .nets import Plain, Res, Transformer, shapes, zeroed

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Res().eval()


def graph_of(model, x=X, **options):
    return tp.DependencyGraph().build_dependency(model, example_inputs=x, **options)


def test_a_group_lists_every_layer_that_loses_the_channels(model):
    group = graph_of(model).get_pruning_group(
        model.conv1, tp.prune_conv_out_channels, idxs=[2, 6, 9]
    )
    found = {(dep.target.path, dep.handler) for dep, _ in group}
    out, inside, norm = (
        tp.prune_conv_out_channels, tp.prune_conv_in_channels, tp.prune_batchnorm_out_channels,
    )  # fmt: skip
    assert found == {
        ("conv1", out), ("bn1", norm), ("layer1.0.conv1", inside), ("layer1.0.conv2", out),
        ("layer1.0.bn2", norm), ("layer1.1.conv1", inside), ("layer1.1.conv2", out),
        ("layer1.1.bn2", norm), ("layer2.0", inside),
    }  # fmt: skip
    assert all(idxs == [2, 6, 9] for _, idxs in group)
    dep = group[0].dep
    assert dep.target.module is model.conv1 and dep.layer is model.conv1
    assert dep.handler == dep.pruning_fn == tp.prune_conv_out_channels
    assert len(group) == 9 and group[0].root_idxs == [0, 1, 2]


def test_a_group_prints_what_triggers_what(model):
    group = graph_of(model).get_pruning_group(model.conv1, tp.prune_conv_out_channels, [2, 6])
    text = group.details()
    assert "prune_out_channels on conv1" in text and "prune_in_channels on layer2.0" in text
    assert "=>" in text and "(Pruning Root)" in text and "[2, 6]" in text
    assert "len(idxs)=2" in str(group)


def test_pruning_in_place_equals_zeroing_what_reads_the_channels(model):
    graph = graph_of(model)
    group = graph.get_pruning_group(model.layer1[0].conv1, tp.prune_conv_out_channels, [0, 5])
    reference = copy.deepcopy(model)
    second = reference.layer1[0].conv2
    second.weight.data = zeroed(second.weight, 1, [0, 5])
    assert graph.check_pruning_group(group)
    group.prune()
    assert model.layer1[0].conv1.out_channels == model.layer1[0].bn1.num_features == 14
    assert model.layer1[0].conv2.in_channels == 14
    torch.testing.assert_close(model(X), reference(X))


def test_the_whole_model_is_saved_and_loaded(model):
    graph_of(model).get_pruning_group(model.conv1, tp.prune_conv_out_channels, [2, 6]).prune()
    file = io.BytesIO()
    model.zero_grad()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(X), model(X))


def test_removing_everything_is_noticed_before_and_refused_after(model):
    graph = graph_of(model)
    before = shapes(model)
    group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, range(16))
    assert not graph.check_pruning_group(group)
    with pytest.raises(PruneError, match="leave at least one"):
        group.prune()
    assert shapes(model) == before


def test_all_groups_are_scanned_and_pruned_with_own_indices(model):
    graph = graph_of(model)
    ignored = [model.layer2]
    for group in graph.get_all_groups(
        ignored_layers=ignored, root_module_types=[nn.Conv2d, nn.Linear]
    ):
        assert len(group[0].idxs) == 16
        group.prune(idxs=[2, 4, 6])
        assert len(group) > 1
    assert model.conv1.out_channels == model.layer1[1].conv1.out_channels == 13
    assert model.layer2[0].out_channels == 32 and model.fc.out_features == 10
    assert model(X).shape == (1, 10)


def test_groups_can_be_collected_first_and_pruned_later(model):
    groups = list(graph_of(model).get_all_groups())
    for group in groups:
        group.prune(idxs=[0])
    assert model.conv1.out_channels == 15 and model.layer2[0].out_channels == 31
    assert model(X).shape == (1, 10)


def test_a_group_is_refused_once_its_channels_have_been_renumbered(model):
    graph = graph_of(model)
    first, second = (
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [i]) for i in (0, 1)
    )
    first.prune()
    with pytest.raises(PruneError, match="get the group again"):
        second.prune()


def test_any_layer_of_a_group_can_be_its_root(model):
    graph = graph_of(model)
    for module, prune in (
        (model.bn1, tp.prune_batchnorm_out_channels),
        (model.layer2[0], tp.prune_conv_in_channels),
        (model.layer1[0].conv2, tp.prune_conv_out_channels),
    ):
        group = graph.get_pruning_group(module, prune, [3])
        assert group[0].dep.target.module is module
        assert {dep.target.path for dep, _ in group} >= {"conv1", "bn1", "layer2.0"}


def test_the_channels_of_a_flattened_picture():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(4 * 64, 5)).eval()
    reference = copy.deepcopy(model)
    reference[2].weight.data = zeroed(reference[2].weight, 1, list(range(64, 128)))
    group = graph_of(model).get_pruning_group(model[0], tp.prune_conv_out_channels, [1])
    item = group[1]
    assert item.idxs == list(range(64, 128)) and set(item.root_idxs) == {0}
    group.prune()
    assert model[2].in_features == 192
    torch.testing.assert_close(model(X), reference(X))


def test_a_channel_of_the_output_goes_only_when_it_is_asked_for(model):
    graph = graph_of(model)
    assert all(group[0].dep.layer is not model.fc for group in graph.get_all_groups())
    graph.get_pruning_group(model.fc, tp.prune_linear_out_channels, [0, 1]).prune()
    assert model(X).shape == (1, 8)


def test_why_channels_must_stay_is_said(model):
    graph = graph_of(model)
    with pytest.raises(PruneError, match="model input"):
        graph.get_pruning_group(model.conv1, tp.prune_conv_in_channels, [0])
    with pytest.raises(PruneError, match=r"0\.\.15"):
        graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [16])
    with pytest.raises(PruneError, match="no part of"):
        graph.get_pruning_group(nn.Conv2d(3, 4, 1), tp.prune_conv_out_channels, [0])
    with pytest.raises(PruneError, match="no pruning function"):
        graph.get_pruning_group(model.conv1, print, [0])


def test_bare_parameters_are_roots_and_members():
    torch.manual_seed(0)
    model = Transformer().eval()
    x = torch.randn(2, 3, 6)
    graph = graph_of(model, x)
    group = graph.get_pruning_group(model.token, tp.prune_parameter_out_channels, [0, 4])
    assert {"token", "embed", "norm1", "head"} <= {dep.target.path for dep, _ in group}
    with pytest.warns(UserWarning, match="holds widths as constants"):
        group.prune()
    assert model.token.shape == (1, 1, 14) and model.embed.out_features == 14
    assert model(x).shape == (2, 5)


def test_the_history_prunes_a_fresh_model_alike(model):
    graph = graph_of(model)
    for group in graph.get_all_groups():
        group.prune(idxs=[1, 2])
    fresh = Res().eval()
    graph_of(fresh).load_pruning_history(graph.pruning_history())
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(X), model(X))
    name, is_out, idxs = graph.pruning_history()[0]
    assert (name, is_out, idxs) == ("conv1", True, [1, 2])


def test_the_graph_follows_when_somebody_else_changes_the_model(model):
    graph = graph_of(model)
    tp.prune_conv_out_channels(model.layer2[0], [0, 1])
    tp.prune_linear_in_channels(model.fc, [0, 1])
    group = graph.get_pruning_group(model.layer2[0], tp.prune_conv_out_channels, range(3))
    group.prune()
    assert model.fc.in_features == 27 and model(X).shape == (1, 10)


class Scale(nn.Module):
    """A layer of the user's own, with a width in an attribute."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.scale = nn.Parameter(torch.rand(dim))

    def forward(self, x):
        return x * self.scale.view(1, self.dim, 1, 1)


class ScalePruner(tp.BasePruningFunc):
    def prune_out_channels(self, layer, idxs):
        keep = [i for i in range(layer.dim) if i not in idxs]
        layer.scale = nn.Parameter(layer.scale.detach()[keep])
        layer.dim = len(keep)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer):
        return layer.dim

    get_in_channels = get_out_channels


@pytest.mark.parametrize("by_type", [True, False])
def test_layers_with_a_pruner_of_their_own(by_type):
    torch.manual_seed(0)
    model = Plain(Scale(8)).eval()
    reference = copy.deepcopy(model)
    reference.last.weight.data = zeroed(reference.last.weight, 1, [0, 3])
    graph = tp.DependencyGraph()
    graph.register_customized_layer(Scale if by_type else model.between, ScalePruner())
    graph.build_dependency(model, X)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, [0, 3])
    assert any(dep.target.module is model.between for dep, _ in group)
    group.prune()
    assert model.between.dim == 6 and "forward" not in vars(model)
    torch.testing.assert_close(model(X), reference(X))


def test_without_a_pruner_of_its_own_the_attribute_of_a_layer_follows():
    model = Plain(Scale(8)).eval()
    reference = copy.deepcopy(model)
    reference.last.weight.data = zeroed(reference.last.weight, 1, [0, 3])
    graph = graph_of(model)
    for idxs, left in (([3], 7), ([0], 6)):
        graph.get_pruning_group(model.first, tp.prune_conv_out_channels, idxs).prune()
        assert model.between.dim == left and "forward" not in vars(model)
    torch.testing.assert_close(model(X), reference(X))


class Spelt(Scale):
    """The same with the width in its code."""

    def forward(self, x):
        return x * self.scale.view(1, 8, 1, 1)


def test_a_layer_that_spells_its_width_out_runs_as_recorded():
    model = Plain(Spelt(8)).eval()
    reference = copy.deepcopy(model)
    reference.last.weight.data = zeroed(reference.last.weight, 1, [0, 3])
    group = graph_of(model).get_pruning_group(model.first, tp.prune_conv_out_channels, [0, 3])
    with pytest.warns(UserWarning, match="holds widths as constants"):
        group.prune()
    torch.testing.assert_close(model(X), reference(X))
    other = torch.randn(3, 3, 8, 8)  # another batch than the traced one
    torch.testing.assert_close(copy.deepcopy(model)(other), reference(other))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    torch.testing.assert_close(torch.load(file, weights_only=False)(other), reference(other))


def test_a_pruner_that_does_too_little_is_found_out():
    class Half(ScalePruner):
        def prune_out_channels(self, layer, idxs):
            layer.scale = nn.Parameter(layer.scale.detach()[: layer.dim - 1])
            return layer

    model = Plain(Scale(8)).eval()
    graph = graph_of(model, customized_pruners={Scale: Half()})
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, [0, 3])
    with pytest.raises(PruneError, match=r"between.scale with shape \[7\]; expected \[6\]"):
        group.prune()


def test_soft_pruning_zeroes_what_the_groups_list(model):
    pruner = tp.pruner.MagnitudePruner(model, X, importance=tp.importance.MagnitudeImportance())
    before = shapes(model)
    for group in pruner.step(interactive=True):
        for dep, idxs in group:
            layer, prune = dep.target.module, dep.handler
            if prune in [tp.prune_conv_in_channels, tp.prune_linear_in_channels]:
                layer.weight.data[:, idxs] *= 0
            elif prune in [tp.prune_conv_out_channels, tp.prune_batchnorm_out_channels]:
                layer.weight.data[idxs] *= 0
                if layer.bias is not None:
                    layer.bias.data[idxs] *= 0
    assert shapes(model) == before
    soft = model(X)
    hard = tp.pruner.MagnitudePruner(model, X, importance=tp.importance.MagnitudeImportance())
    hard.step()  # the zeroed channels are the lowest now: removing them changes nothing
    assert model.conv1.out_channels == 8
    torch.testing.assert_close(model(X), soft)
