"""What goes wrong for users of pruning libraries, and must not go wrong here."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import prune2deploy.pruning as tp
from prune2deploy.errors import PruneError

from .nets import Plain, Res, Tied, zeroed

X = torch.randn(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


def graph_of(model, x=X):
    return tp.DependencyGraph().build_dependency(model, x)


def half(model, x=X, **options):
    pruner = tp.pruner.BasePruner(model, x, importance=MAGNITUDE, **options)
    pruner.step()
    return pruner


def dropped(model, x=X, **options):
    """Parameters left after halving, as a fraction; the model must still run and train."""
    before = sum(p.numel() for p in model.parameters())
    shape = model(x).shape
    half(model, x, **options)
    assert model(x).shape == shape
    model.train()
    model(torch.cat([x, x])).sum().backward()
    return sum(p.numel() for p in model.parameters()) / before


class Shuffle(nn.Module):
    def forward(self, x):
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


@pytest.mark.parametrize(
    "between",
    [Shuffle(), nn.ChannelShuffle(2), nn.PixelUnshuffle(2), nn.PixelShuffle(2), nn.Fold],
    ids=["view", "channel_shuffle", "pixel_unshuffle", "pixel_shuffle", "fold"],
)
def test_indices_stay_right_through_reshapes(between):
    torch.manual_seed(0)
    if between is nn.Fold:
        between = nn.Sequential(nn.Unfold(2, stride=2), nn.Fold((8, 8), 2, stride=2))
    model = Plain(between, width=16)
    model.last = nn.Conv2d(model.between(model.first(X)).shape[1], 4, 1)
    model.eval()
    graph = graph_of(model)
    group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, [1, 9])
    reference = copy.deepcopy(model)
    read = next(item.idxs for item in group if item.dep.layer is model.last)
    reference.last.weight.data = zeroed(reference.last.weight, 1, read)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        group.prune()
    assert model.first.out_channels == 16 - len(group[0].idxs) < 16
    torch.testing.assert_close(model(X), reference(X))


def test_a_split_channel_takes_its_partner_of_equal_count():
    class Chunk(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Conv2d(3, 16, 1)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            a, b = self.first(x).chunk(2, 1)
            return self.last(torch.sigmoid(a) * b)

    model = Chunk().eval()
    reference = copy.deepcopy(model)
    reference.last.weight.data = zeroed(reference.last.weight, 1, [2])
    graph_of(model).get_pruning_group(model.first, tp.prune_conv_out_channels, [2]).prune()
    assert model.first.out_channels == 14
    torch.testing.assert_close(model(X), reference(X))
    half(model)
    assert model.first.out_channels == 6


@pytest.mark.parametrize("how", ["no_grad", "inference_decorator", "frozen", "detached"])
def test_pruning_does_not_depend_on_gradients(how):
    model = Res()
    if how == "frozen":
        model.requires_grad_(False)
    if how == "detached":
        model.layer1.register_forward_hook(lambda module, args, result: result.detach())
    if how == "inference_decorator":
        model.forward = torch.no_grad()(model.forward)
    if how == "no_grad":
        with torch.no_grad():
            half(model)
    else:
        half(model)
    assert model.conv1.out_channels == 8 and model.layer1[1].conv1.out_channels == 8
    assert model.conv1.weight.requires_grad == (how != "frozen")
    if how == "detached":
        assert model(X).shape == (1, 10)


def test_a_branch_that_is_not_taken_is_named_when_asked_for_and_kept_otherwise():
    class Branches(Res):
        def __init__(self):
            super().__init__()
            self.unused = nn.Conv2d(16, 16, 3)
            self.spare = nn.Parameter(torch.randn(5))

    model = Branches()
    graph = graph_of(model)
    with pytest.raises(PruneError, match="has to stay: not used in the forward pass"):
        graph.get_pruning_group(model.unused, tp.prune_conv_out_channels, [0])
    half(model)
    assert model.conv1.out_channels == 8 and model.unused.weight.shape == (16, 16, 3, 3)
    assert {"unused.weight", "unused.bias", "spare"} <= set(model.state_dict())


def test_very_deep_models_need_no_recursion():
    depth = 1200  # deeper than Python's stack

    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(4, 6)
            self.layers = nn.ModuleList(nn.Linear(6, 6) for _ in range(depth))

        def forward(self, x):
            x = self.first(x)
            for layer in self.layers:
                x = x + layer(x)
            return x.sum(-1)

    graph = graph_of(Chain(), torch.randn(2, 4))
    (group,) = graph.get_all_groups()
    assert len(group) == 2 * depth + 1
    group.prune(idxs=[0])


class FrozenNorm(nn.Module):
    """Statistics and scale as buffers, as detection models keep them."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        shift = self.bias - self.running_mean * scale
        return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def test_frozen_normalisation_goes_along():
    model = Plain(FrozenNorm(8)).eval()
    reference = copy.deepcopy(model)
    reference.last.weight.data = zeroed(reference.last.weight, 1, [2, 7])
    graph_of(model).get_pruning_group(model.first, tp.prune_conv_out_channels, [2, 7]).prune()
    assert all(b.shape == (6,) for b in model.between.buffers())
    assert set(model.state_dict()) == set(reference.state_dict())
    torch.testing.assert_close(model(X), reference(X))


def test_a_convolution_of_one_channel_is_not_depthwise():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.Conv2d(8, 1, 1), nn.Conv2d(1, 1, 3), nn.Conv2d(1, 8, 1),
        nn.Conv2d(8, 2, 1),
    )  # fmt: skip
    half(model)
    assert [layer.out_channels for layer in model] == [4, 1, 1, 4, 2]
    assert model(X).shape == (1, 2, 6, 6)


@pytest.mark.parametrize("groups", [2, 4, 8])
def test_group_counts_fit_after_pruning(groups):
    model = Plain(nn.Sequential(nn.Conv2d(8, 8, 3, groups=groups), nn.GroupNorm(groups, 8)))
    assert dropped(model) < 0.7 or groups == 8
    conv = model.between[0]
    assert conv.weight.shape[0] % conv.groups == 0
    assert conv.in_channels == conv.weight.shape[1] * conv.groups


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_models_run_after_pruning(kind):
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Linear(6, 8)
            self.rnn = kind(8, 8, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            return self.head(self.rnn(self.embed(x))[0])

    assert dropped(Recurrent(), torch.randn(2, 4, 6)) < 1


@pytest.mark.parametrize("width", [4, 6, 9, 12, 17])
def test_rounding_spares_narrow_layers(width):
    model = Res(width)
    half(model, round_to=8)
    expected = width if width < 8 else 8
    assert model.conv1.out_channels == expected and model(X).shape == (1, 10)


def test_channels_of_equal_score_do_not_all_go():
    model = Res()
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.1)
    half(model, global_pruning=True, pruning_ratio=0.25)
    left = model.conv1.out_channels + model.layer2[0].out_channels
    left += sum(block.conv1.out_channels for block in model.layer1)
    assert left == 60


def traced(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some versions of torch call tracing deprecated
        return torch.jit.trace(model, X)


def test_attributes_are_right_for_tracing_scripting_and_export():
    model = Res().eval()
    half(model)
    wanted = model(X)
    for again in (
        traced(model),
        torch.export.export(model, (X,), strict=False).module(),
        copy.deepcopy(model),
    ):
        torch.testing.assert_close(again(X), wanted)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels)


def test_a_replaced_forward_traces_too():
    class Fixed(Res):
        def forward(self, x):
            x = F.relu(self.bn1(self.conv1(x))).view(-1, 16, 64)
            return self.fc(self.layer2(self.layer1(x.view(-1, 16, 8, 8))).mean((2, 3)))

    model = Fixed().eval()
    with pytest.warns(UserWarning, match="constants"):
        half(model)
    torch.testing.assert_close(traced(model)(X), model(X))
    half_again = tp.pruner.BasePruner(model, X, importance=MAGNITUDE, pruning_ratio=0.25)
    half_again.step()
    assert model.conv1.out_channels == 6 and model(torch.cat([X, X])).shape == (2, 10)


def test_a_replaced_forward_still_drops_in_training():
    class Skip(nn.Module):
        def forward(self, x):
            return x * (torch.rand(len(x), 1, 1, 1) > 0.5) if self.training else x

    class Dropping(Res):
        def __init__(self):
            super().__init__()
            self.skip = Skip()

        def forward(self, x):
            x = F.dropout(self.conv1(x).view(-1, 16, 64), 0.5, self.training)
            x = self.skip(self.layer1(x.view(-1, 16, 8, 8)))
            return self.fc(self.layer2(x).mean((2, 3)))

    model, calls = Dropping().eval(), []
    with pytest.warns(UserWarning, match="constants"):
        half(model)
    for again in (model, copy.deepcopy(model)):
        assert torch.equal(again(X), again(X))
        again.train().skip.register_forward_hook(lambda *_: calls.append(1))
        assert not torch.equal(again(X.expand(8, -1, -1, -1)), again(X.expand(8, -1, -1, -1)))
    assert len(calls) == 4


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_parametrised_weights_are_pruned_through_what_is_stored(norm):
    torch.manual_seed(0)
    model = Plain(nn.ReLU()).eval()
    norm(model.last)
    graph = graph_of(model)
    if norm is parametrizations.weight_norm:
        group = graph.get_pruning_group(model.first, tp.prune_conv_out_channels, [0, 3])
        group.prune()
        assert model.first.out_channels == 6
        assert model.last.parametrizations.weight.original1.shape == (4, 6, 1, 1)
    else:
        half(model)  # its vectors tie the channels down: nothing may break
    assert model(X).shape == (1, 4, 8, 8)


def test_tied_embeddings_stay_tied():
    model = Tied()
    tokens = torch.arange(5)[None]
    half(model, tokens)
    assert model.table.weight is model.out.weight
    assert model.table.weight.shape == (11, 4) and model.out.in_features == 4
    assert model(tokens).shape == (1, 5, 11)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.table.weight is loaded.out.weight


def test_a_model_that_cannot_run_pruned_is_put_back():
    class Stubborn(Res):
        def forward(self, x):
            wide = F.relu(self.bn1(self.conv1(x)))
            if wide.shape[1] != 16:
                raise ValueError("sixteen or nothing")
            return self.fc(self.layer2(self.layer1(wide)).mean((2, 3)))

    model = Stubborn().eval()
    before = model(X)
    graph = tp.DependencyGraph().build_dependency(model, X, forward_fn=lambda m, x: m(x))
    group = graph.get_pruning_group(model.conv1, tp.prune_conv_out_channels, [0])
    with pytest.raises(PruneError, match="put back as it was"):
        group.prune()
    assert model.conv1.out_channels == 16 and torch.equal(model(X), before)
    again = graph.get_pruning_group(model.layer1[0].conv1, tp.prune_conv_out_channels, [0])
    again.prune()
    assert model(X).shape == (1, 10)
