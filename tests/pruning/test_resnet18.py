"""The usual first script, on the model that it is usually written for."""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet18

import prune2deploy.pruning as tp

X = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_half_of_resnet18_has_the_known_number_of_parameters():
    model = resnet18()
    ignored = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == 1000]
    pruner = tp.pruner.BasePruner(
        model, X, importance=tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=ignored, round_to=8,
    )  # fmt: skip
    macs, params = tp.utils.count_ops_and_params(model, torch.randn(1, 3, 224, 224))
    assert (macs, params) == (1_814_073_344, 11_689_512)
    pruner.step()
    macs, params = tp.utils.count_ops_and_params(model, torch.randn(1, 3, 224, 224))
    assert params == 3_055_880
    assert [model.conv1.out_channels, model.layer4[1].conv2.out_channels] == [32, 256]


def test_ratios_per_stage_ranked_globally():
    model = resnet18()
    tp.pruner.BasePruner(
        model, X, importance=tp.importance.MagnitudeImportance(), global_pruning=True,
        pruning_ratio=0.5,
        pruning_ratio_dict={(model.layer1, model.layer2): 0.4, model.layer3: 0.2},
    ).step()  # fmt: skip
    early = [model.conv1, model.layer2[0].conv2]
    early += [block.conv1 for stage in (model.layer1, model.layer2) for block in stage]
    assert sum(layer.out_channels for layer in early) == int((64 * 3 + 128 * 3) * 0.6 + 1e-6)
    late = [model.layer3[0].conv2, *(block.conv1 for block in model.layer3)]
    assert sum(layer.out_channels for layer in late) == int(256 * 3 * 0.8 + 1e-6)
    assert model(X).shape == (2, 1000)


def test_interactive_steps_with_training_between():
    model = resnet18()
    pruner = tp.pruner.GroupNormPruner(
        model, X, importance=tp.importance.GroupMagnitudeImportance(), iterative_steps=2
    )
    for _ in range(2):
        pruner.update_regularizer()
        F.cross_entropy(model(X), torch.tensor([3, 4])).backward()
        pruner.regularize(model)
        torch.optim.SGD(model.parameters(), lr=1e-3).step()
        for group in pruner.step(interactive=True):
            dep, idxs = group[0]
            assert isinstance(dep.target.module, nn.Conv2d) and len(idxs) > 0
            group.prune()
    assert model.layer4[1].conv1.out_channels == 256
    assert model(X).shape == (2, 1000)
