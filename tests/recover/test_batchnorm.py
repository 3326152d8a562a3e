import copy

import pytest
import torch
from torch import nn

from prune2deploy.recover import reestimate_batchnorm


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5),
        nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4, momentum=0.3), nn.Flatten(), nn.LazyLinear(2),
    )  # fmt: skip


def batches(count=5, size=16):
    generator = torch.Generator().manual_seed(1)
    return [
        ((torch.randn(size, 3, 6, 6, generator=generator) * 3 + 1,), None) for _ in range(count)
    ]


@pytest.fixture
def module():
    made = net().eval()
    made(torch.zeros(1, 3, 6, 6))
    return made


def test_statistics_are_the_mean_over_batches(module):
    data = batches()
    done = reestimate_batchnorm(module, data)
    assert (done.layers, done.samples, done.note) == (2, 80, "")
    seen = [module[0](x).detach() for (x,), _ in data]
    mean = torch.stack([y.mean((0, 2, 3)) for y in seen]).mean(0)
    var = torch.stack([y.var((0, 2, 3)) for y in seen]).mean(0)
    torch.testing.assert_close(module[1].running_mean, mean)
    torch.testing.assert_close(module[1].running_var, var)


def test_doing_it_twice_changes_nothing_more(module):
    reestimate_batchnorm(module, batches())
    once = copy.deepcopy(module.state_dict())
    reestimate_batchnorm(module, batches())
    assert all(torch.equal(once[k], v) for k, v in module.state_dict().items())


def test_weights_modes_and_momenta_stay(module):
    module[0].train()
    module[1].train()
    weights = {k: v.clone() for k, v in module.named_parameters()}
    modes = [m.training for m in module.modules()]
    reestimate_batchnorm(module, batches())
    assert [m.training for m in module.modules()] == modes
    assert module[1].momentum == 0.1 and module[5].momentum == 0.3
    assert all(torch.equal(weights[k], v) for k, v in module.named_parameters())


@pytest.mark.parametrize("data", [None, []])
def test_without_data_nothing_changes_and_it_says_so(module, data):
    before = copy.deepcopy(module.state_dict())
    done = reestimate_batchnorm(module, data)
    assert done.layers == 0 and "no data" in done.note
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_failing_forward_restores_everything(module):
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(RuntimeError):
        reestimate_batchnorm(module, [*batches(1), ((torch.zeros(2, 5, 6, 6),), None)])
    assert module[1].momentum == 0.1 and not module[1].training
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())


def test_a_model_without_batchnorm_says_so():
    done = reestimate_batchnorm(nn.Linear(2, 2), [((torch.zeros(1, 2),), None)])
    assert done.layers == 0 and "no BatchNorm" in done.note


def test_it_repairs_a_model_whose_statistics_are_wrong(module):
    x = batches(1)[0][0][0]
    module.eval()
    reestimate_batchnorm(module, [((x,), None)])
    with torch.no_grad():
        right = module(x)
        module[1].running_mean.add_(3)
        module[1].running_var.mul_(9)
        assert (module(x) - right).abs().max() > 0.1
        reestimate_batchnorm(module, [((x,), None)])
        torch.testing.assert_close(module(x), right)


def test_batches_count_by_their_size(module):
    whole = batches(1, size=19)[0][0][0]
    uneven = [((whole[:16],), None), ((whole[16:],), None)]
    reestimate_batchnorm(module, uneven)
    seen = module[0](whole).detach()
    torch.testing.assert_close(module[1].running_mean, seen.mean((0, 2, 3)))
    parts = [16 / 19 * seen[:16].var((0, 2, 3)), 3 / 19 * seen[16:].var((0, 2, 3))]
    torch.testing.assert_close(module[1].running_var, sum(parts))


def test_one_value_per_channel_says_nothing_of_variance():
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    x = torch.randn(9, 3)
    reestimate_batchnorm(module, [((x[:8],), None)])
    eight = copy.deepcopy(module.state_dict())
    done = reestimate_batchnorm(module, [((x[:8],), None), ((x[8:],), None)])
    assert (done.layers, done.samples) == (1, 9)
    for name in ("1.running_mean", "1.running_var"):
        torch.testing.assert_close(module.state_dict()[name], eight[name])
    alone = reestimate_batchnorm(module, [((x[8:],), None)])
    assert alone.layers == 0
    torch.testing.assert_close(module[1].running_mean, eight["1.running_mean"])


def test_programs_are_re_estimated_as_layers_are(module):
    example = batches(1)[0][0]
    program = torch.export.export(copy.deepcopy(module), example, strict=False).module()
    done, expected = (reestimate_batchnorm(m, batches()) for m in (program, module))
    assert done == expected and done.layers == 2
    for name, value in program.state_dict().items():
        torch.testing.assert_close(value, module.state_dict()[name])


def test_a_batchnorm_that_runs_twice_gets_the_average_of_both():
    norm = nn.BatchNorm1d(3)
    module = nn.Sequential(norm, nn.Linear(3, 3), norm).eval()
    x = batches(1)[0][0][0][:, :, 0, 0]
    with torch.no_grad():
        first = nn.BatchNorm1d(3).train()(x)
        later = module[1](first)
    done = reestimate_batchnorm(module, [((x,), None)])
    assert done.layers == 1
    torch.testing.assert_close(norm.running_mean, (x.mean(0) + later.mean(0)) / 2)
    torch.testing.assert_close(norm.running_var, (x.var(0) + later.var(0)) / 2)
