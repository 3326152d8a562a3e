"""The functions that prune one layer: shapes, attributes, values, gradients, refusals."""

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp
from prune2deploy.errors import PruneError
from prune2deploy.pruning import function

GONE = [1, 3]
LEFT8 = [0, 2, 4, 5, 6, 7]


def test_there_are_24_of_them_and_all_are_offered():
    named = [name for name in vars(function) if name.startswith("prune_")]
    assert len(named) == 24
    assert all(getattr(tp, name) is getattr(function, name) for name in named)
    assert set(named) <= set(tp.__all__)
    assert all(getattr(tp.pruner, name) is getattr(tp, name) for name in named)


def test_conv_out_and_in_equal_plain_indexing():
    layer = nn.Conv2d(8, 8, 3)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    assert tp.prune_conv_out_channels(layer, idxs=GONE) is layer
    assert torch.equal(layer.weight, weight[LEFT8]) and torch.equal(layer.bias, bias[LEFT8])
    assert (layer.in_channels, layer.out_channels) == (8, 6)
    tp.prune_conv_in_channels(layer, idxs=GONE)
    assert torch.equal(layer.weight, weight[LEFT8][:, LEFT8])
    assert layer(torch.randn(1, 6, 5, 5)).shape == (1, 6, 3, 3)


def test_transposed_convolution_keeps_channels_the_other_way_round():
    layer = nn.ConvTranspose2d(8, 6, 2)
    tp.prune_conv_out_channels(layer, [0])
    tp.prune_conv_in_channels(layer, GONE)
    assert layer.weight.shape == (6, 5, 2, 2)
    assert layer(torch.randn(1, 6, 4, 4)).shape == (1, 5, 5, 5)


def test_grouped_convolution_reads_the_channels_that_stay():
    layer = nn.Conv2d(8, 4, 1, groups=2, bias=False)
    x = torch.randn(1, 8, 1, 1)
    x[:, [1, 6]] = 0
    wanted = layer(x)
    tp.prune_conv_in_channels(layer, [1, 6])  # one of each group, in different places
    assert torch.allclose(layer(x[:, [0, 2, 3, 4, 5, 7]]), wanted)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("prune", [tp.prune_conv_in_channels, tp.prune_conv_out_channels])
def test_groups_that_would_become_unequal_are_refused(kind, prune):
    layer = kind(8, 8, 1, groups=2)
    before = layer.weight
    with pytest.raises(PruneError, match=r"equally many channels in each; \[2, 0\] would go"):
        prune(layer, [0, 1])
    assert layer.weight is before and layer(torch.ones(1, 8, 1, 1)).shape == (1, 8, 1, 1)


def test_depthwise_convolution_loses_both_sides():
    layer = nn.Conv2d(8, 8, 3, groups=8)
    tp.prune_depthwise_conv_out_channels(layer, GONE)
    assert (layer.in_channels, layer.out_channels, layer.groups) == (6, 6, 6)
    assert layer(torch.randn(1, 6, 3, 3)).shape == (1, 6, 1, 1)
    tp.prune_depthwise_conv_in_channels(layer, [0])
    assert layer.groups == 5


def test_linear_and_gradients_follow():
    layer = nn.Linear(8, 8)
    layer(torch.randn(2, 8)).sum().backward()
    gradient = layer.weight.grad.clone()
    tp.prune_linear_out_channels(layer, GONE)
    tp.prune_linear_in_channels(layer, GONE)
    assert (layer.in_features, layer.out_features) == (6, 6)
    assert torch.equal(layer.weight.grad, gradient[LEFT8][:, LEFT8])
    assert layer.bias.grad.shape == (6,)


@pytest.mark.parametrize(
    ("layer", "prune", "attribute", "x"),
    [
        (nn.BatchNorm2d(8), tp.prune_batchnorm_out_channels, "num_features", (2, 6, 3, 3)),
        (nn.BatchNorm1d(8, affine=False), tp.prune_batchnorm_in_channels, "num_features", (2, 6)),
        (
            nn.BatchNorm2d(8, track_running_stats=False),
            tp.prune_batchnorm_out_channels, "num_features", (2, 6, 3, 3),
        ),
        (
            nn.InstanceNorm2d(8, affine=True),
            tp.prune_instancenorm_out_channels, "num_features", (2, 6, 3, 3),
        ),
        (nn.GroupNorm(2, 8), tp.prune_groupnorm_out_channels, "num_channels", (2, 6, 3, 3)),
        (nn.PReLU(8), tp.prune_prelu_out_channels, "num_parameters", (2, 6, 3, 3)),
    ],
)  # fmt: skip
def test_layers_that_treat_channels_one_by_one(layer, prune, attribute, x):
    layer = layer.train()
    prune(layer, GONE)
    assert getattr(layer, attribute) == 6
    assert layer(torch.randn(x)).shape == x


def test_a_shared_slope_is_left_alone():
    assert tp.prune_prelu_in_channels(nn.PReLU(), [0]).num_parameters == 1


@pytest.mark.parametrize("layer", [nn.LayerNorm(8), nn.LayerNorm(8, bias=False), nn.RMSNorm(8)])
def test_layer_normalisation(layer):
    tp.prune_layernorm_out_channels(layer, GONE)
    assert layer.normalized_shape == (6,)
    assert layer(torch.randn(2, 6)).shape == (2, 6)


def test_embedding_loses_width():
    layer = nn.Embedding(10, 8)
    tp.prune_embedding_out_channels(layer, GONE)
    assert layer.embedding_dim == 6
    assert layer(torch.tensor([9])).shape == (1, 6)


def test_a_bare_parameter_is_returned():
    old = nn.Parameter(torch.randn(1, 4, 8))
    new = tp.prune_parameter_out_channels(old, GONE)
    assert isinstance(new, nn.Parameter) and torch.equal(new, old[..., LEFT8])


def test_multihead_attention_runs_with_a_smaller_embedding():
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    tp.prune_multihead_attention_out_channels(layer, [1, 5])
    x = torch.randn(2, 3, 6)
    assert layer(x, x, x)[0].shape == (2, 3, 6)
    with pytest.raises(PruneError, match="multiple of 2"):
        tp.prune_multihead_attention_in_channels(layer, [0])


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
@pytest.mark.parametrize("both", [False, True])
def test_recurrent_layers_equal_zeroed_ones(kind, both):
    torch.manual_seed(0)
    layer = kind(5, 4, bidirectional=both, batch_first=True)
    with torch.no_grad():  # a unit that is always zero and that nobody reads
        for end in ("", "_reverse") if both else ("",):
            for name in ("weight_ih_l0", "weight_hh_l0", "bias_ih_l0", "bias_hh_l0"):
                tensor = getattr(layer, name + end)
                tensor.view(-1, 4, *tensor.shape[1:])[:, 2] = 0
            getattr(layer, "weight_hh_l0" + end)[:, 2] = 0
    x = torch.randn(2, 3, 5)
    wanted = layer(x)[0]
    tp.prune_lstm_out_channels(layer, [2])
    assert layer.hidden_size == 3
    kept = [0, 1, 3, 4, 5, 7] if both else [0, 1, 3]
    assert torch.allclose(layer(x)[0], wanted[..., kept], atol=1e-6)
    tp.prune_lstm_in_channels(layer, [0])
    assert layer(x[..., 1:])[0].shape == (2, 3, len(kept))


@pytest.mark.parametrize(("idxs", "match"), [([8], "0..7"), ([-1], "0..7"), (range(8), "all 8")])
def test_bad_indices_are_refused_and_nothing_changes(idxs, match):
    layer = nn.Linear(8, 8)
    with pytest.raises(PruneError, match=match):
        tp.prune_linear_out_channels(layer, list(idxs))
    assert layer.weight.shape == (8, 8)
