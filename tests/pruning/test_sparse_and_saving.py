"""Sparse training, and saving and loading pruned models."""

import io

import pytest
import torch
from torch import nn

import prune2deploy.pruning as tp
from prune2deploy.errors import ConfigError

from .nets import Plain, Res, Tied, Transformer

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([1, 2, 3, 4])
MAGNITUDE = tp.importance.GroupMagnitudeImportance(p=2)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Res()


def gradients(model):
    model.zero_grad()
    nn.functional.cross_entropy(model(X), LABELS).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def added(model, pruner, **options):
    """What regularising adds to each gradient."""
    before = gradients(model)
    pruner.regularize(model, **options)
    return {name: p.grad - before[name] for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["BNScalePruner", "GroupNormPruner", "GrowingRegPruner"])
def test_sparse_training_as_a_loop_then_pruning(model, kind):
    pruner = getattr(tp.pruner, kind)(model, X, importance=MAGNITUDE, reg=1e-2, iterative_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        model.train()
        pruner.update_regularizer()
        for _ in range(2):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(X), LABELS).backward()
            pruner.regularize(model)
            optimizer.step()
        pruner.step()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert model.conv1.out_channels == 8 and model(X).shape == (4, 10)


def test_network_slimming_adds_the_sign_of_every_scale(model):
    pruner = tp.pruner.BNScalePruner(model, X, importance=MAGNITUDE, reg=0.5)
    with torch.no_grad():
        model.bn1.weight[0] = -2.0
    new = added(model, pruner)
    torch.testing.assert_close(new["bn1.weight"], 0.5 * model.bn1.weight.sign())
    assert float(new["conv1.weight"].abs().max()) == 0
    assert torch.allclose(added(model, pruner, reg=0.1)["bn1.weight"][0], torch.tensor(-0.1))


def test_group_lasso_divides_by_the_norm_of_the_coupled_scales(model):
    pruner = tp.pruner.BNScalePruner(model, X, importance=MAGNITUDE, reg=0.5, group_lasso=True)
    norms = [model.bn1, model.layer1[0].bn2, model.layer1[1].bn2]
    square = torch.stack([n.weight.detach() ** 2 for n in norms]).mean(0) + 1e-9
    wanted = 0.5 * model.bn1.weight.detach() / square.sqrt()
    torch.testing.assert_close(added(model, pruner)["bn1.weight"], wanted, rtol=1e-4, atol=1e-6)


def test_group_sparse_training_pulls_the_weakest_hardest(model):
    with torch.no_grad():
        model.layer1[0].conv1.weight[3] *= 0.01
        model.layer1[0].conv2.weight[:, 3] *= 0.01
        model.layer1[0].bn1.weight[3] *= 0.01
    pruner = tp.pruner.GroupNormPruner(model, X, importance=MAGNITUDE, reg=1.0, alpha=4)
    per_channel = added(model, pruner)["layer1.0.bn1.weight"] / model.layer1[0].bn1.weight.detach()
    assert int(per_channel.argmax()) == 3
    assert per_channel.max() == pytest.approx(16, rel=1e-3)
    assert per_channel.min() == pytest.approx(1, rel=1e-3)


def test_growing_regularisation_grows_where_channels_matter_least(model):
    pruner = tp.pruner.GrowingRegPruner(model, X, importance=MAGNITUDE, reg=0.1, delta_reg=1.0)
    flat = added(model, pruner)["layer2.0.weight"] / model.layer2[0].weight.detach()
    assert torch.allclose(flat, torch.full_like(flat, 0.2), rtol=1e-2)  # both sides are groups
    pruner.update_reg()
    grown = added(model, pruner)["layer1.0.bn1.weight"] / model.layer1[0].bn1.weight.detach()
    assert grown.min() == pytest.approx(0.1, rel=1e-3)
    assert grown.max() == pytest.approx(1.1, rel=1e-3)


def test_ignored_layers_are_not_shrunk(model):
    pruner = tp.pruner.BNScalePruner(model, X, importance=MAGNITUDE, ignored_layers=[model.bn1])
    new = added(model, pruner)
    assert float(new["bn1.weight"].abs().max()) == 0
    assert float(new["layer1.0.bn1.weight"].abs().max()) > 0


def through_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_pruned_model_is_loaded_into_a_fresh_one_without_unpickling_code(model):
    tp.pruner.BasePruner(model, X, importance=MAGNITUDE).step()
    state = through_file(tp.state_dict(model))
    fresh = tp.load_state_dict(Res(), state)
    assert fresh.conv1.out_channels == 8 and fresh.bn1.num_features == 8
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    gradients(fresh)


def test_names_that_share_a_tensor_share_it_after_loading():
    tokens = torch.arange(3)[None]
    model = Tied()
    tp.pruner.BasePruner(
        model, tokens, importance=MAGNITUDE, root_module_types=[nn.Embedding]
    ).step()
    assert model.table.weight is model.out.weight and model.table.embedding_dim == 4
    fresh = tp.load_state_dict(Tied(), through_file(tp.state_dict(model)))
    assert fresh.table.weight is fresh.out.weight
    assert torch.equal(fresh(tokens), model(tokens))


def test_states_of_something_else_are_refused(model):
    with pytest.raises(ConfigError, match="schema None found"):
        tp.load_state_dict(model, model.state_dict())
    with pytest.raises(ConfigError, match="lacks"):
        tp.load_state_dict(Plain(nn.ReLU()), tp.state_dict(model))


def test_a_replaced_forward_is_not_saved_silently():
    model = Transformer()
    with pytest.warns(UserWarning, match="constants"):
        tp.pruner.BasePruner(
            model, torch.randn(1, 3, 6), importance=MAGNITUDE,
            pruning_ratio_dict={model.attention.qkv: 0.25},
        ).step()  # fmt: skip
    with pytest.raises(ConfigError, match="pruning_history"):
        tp.state_dict(model)


def test_the_difference_is_printed(model, capsys):
    tp.utils.print_tool.before_pruning(model)
    tp.pruner.BasePruner(model, X, importance=MAGNITUDE).step()
    told = tp.utils.print_tool.after_pruning(model)
    text = capsys.readouterr().out
    assert text == told + "\n"
    assert tp.utils.print_tool.after_pruning(model, do_print=False) == told
    assert not capsys.readouterr().out
    assert "(conv1): Conv2d(3, 16," in text and "=> (conv1): Conv2d(3, 8," in text
    assert "(1): ReLU()\n" in text
