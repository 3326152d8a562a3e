"""Weights that are stored with their length apart keep the values of what stays of them."""

import numpy as np
import pytest
import torch
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.pruning.live import Live
from prune2deploy.surgery.slicing import apply

LAYERS = {
    "convolution": lambda: nn.Conv2d(16, 16, 3),
    "transposed": lambda: nn.ConvTranspose2d(16, 16, 3),
    "linear": lambda: nn.Linear(16, 16),
}


def spectral(normed, kind):
    """A network with a weight whose vectors have settled, an input, and a plan."""
    torch.manual_seed(0)
    flat = kind == "linear"
    x = torch.randn((2, 3) if flat else (2, 3, 6, 6))
    ends = (nn.Linear(3, 16), nn.Linear(16, 2))
    if not flat:
        ends = (nn.Conv2d(3, 16, 1), nn.Conv2d(16, 2, 1))
    model = nn.Sequential(ends[0], normed(LAYERS[kind]()), ends[1])
    for _ in range(20):
        model(x)
    model.eval()(x)
    rows = (slice(2, 10), slice(4, 16))
    axes = {"0": tuple(range(16))[rows[1]], "2:1": tuple(range(16))[rows[0]]}
    return model, x, Plan(axes), rows[::-1] if kind == "transposed" else rows


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    "normed",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "class"],
)
def test_spectrally_normalised_weights_keep_the_values_that_stay(normed, kind):
    model, x, plan, rows = spectral(normed, kind)
    pruned = apply(model, trace(model, x), plan)
    pruned(x)  # a hook computes the weight
    torch.testing.assert_close(pruned[1].weight, model[1].weight[rows])
    pruned.train()(x).sum().backward()  # which estimates the norm anew


class Twice(nn.Module):
    """Calls a layer twice."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(self.layer(x).relu())


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
def test_spectrally_normalised_weights_are_pruned_in_place_likewise():
    model, x, _, _ = spectral(nn.utils.parametrizations.spectral_norm, "linear")
    wanted = model[1].weight.detach().clone()
    live = Live(model, x, None)
    for gone in ([0, 3], [1, 2, 13]):
        live.remove({"0": np.array(gone), "2:1": np.array(gone)})
        stay = np.setdiff1d(np.arange(len(wanted)), gone)
        wanted = wanted[stay][:, stay]
        torch.testing.assert_close(model[1].weight, wanted)


FORMS = {  # a layer that is called twice, under two names of one list and inside a module
    "listed": lambda layer: (layer, layer),
    "inside": lambda layer: (Twice(layer),),
}


@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize(
    "normed",
    [nn.utils.spectral_norm, nn.utils.parametrizations.spectral_norm],
    ids=["hook", "class"],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_of_a_layer_that_is_called_twice_keeps_its_values_too(normed, form):
    torch.manual_seed(0)
    middle = normed(nn.Linear(16, 16))
    model = nn.Sequential(nn.Linear(3, 16), *FORMS[form](middle), nn.Linear(16, 2))
    x = torch.randn(2, 3)
    for _ in range(20):
        model(x)
    model.eval()(x)
    pruned = apply(model, trace(model, x), Plan({"0": tuple(range(4, 16))}))
    pruned(x)
    layer = pruned[1].layer if form == "inside" else pruned[1]
    torch.testing.assert_close(layer.weight, middle.weight[4:, 4:])
