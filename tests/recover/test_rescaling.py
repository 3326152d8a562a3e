"""Weights before a BatchNorm become as long as they were; outputs stay as they are."""

import copy

import pytest
import torch
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.recover.rescaling import restore_lengths


class Net(nn.Module):
    """Convolutions with and without bias, groups, and some that no BatchNorm follows alone."""

    def __init__(self):
        super().__init__()
        self.a, self.norm_a = nn.Conv2d(3, 8, 3, bias=True), nn.BatchNorm2d(8)
        self.b, self.norm_b = nn.Conv2d(8, 8, 3, groups=4, bias=False), nn.BatchNorm2d(8, eps=1e-3)
        self.plain = nn.Conv2d(8, 8, 1)
        self.read_twice, self.norm_c = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.shared, self.norm_d = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.up, self.norm_e = nn.ConvTranspose2d(8, 8, 2, bias=False), nn.BatchNorm2d(8)
        self.bare, self.norm_f = nn.Conv2d(8, 8, 1, bias=False), nn.BatchNorm2d(8, affine=False)

    def forward(self, x):
        x = torch.relu(self.norm_b(self.b(torch.relu(self.norm_a(self.a(x))))))
        x = self.plain(x)
        y = self.read_twice(x)
        x = self.norm_c(y) + y
        x = self.norm_d(self.shared(self.norm_d(self.shared(x))))
        return self.norm_f(self.bare(self.norm_e(self.up(x))))


ALONE = {"a", "b", "bare"}


@pytest.fixture
def net():
    torch.manual_seed(0)
    module = Net().eval()
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.01, 2)
    return module


def test_lengths_come_back_where_one_batchnorm_reads_and_outputs_stay(net):
    example = torch.randn(2, 3, 9, 9)
    recording = trace(net, example).recording
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        for part in net.modules():
            if isinstance(part, nn.Conv2d):
                part.weight.mul_(torch.linspace(0.5, 3, len(part.weight)).view(-1, 1, 1, 1))
                part.weight.add_(0.01)
    fitted = copy.deepcopy(net)
    assert restore_lengths(net, recording, before) == len(ALONE)
    with torch.no_grad():
        torch.testing.assert_close(net(example), fitted(example), rtol=1e-4, atol=1e-4)
    for name, part in fitted.named_modules():
        if not isinstance(part, (nn.Conv2d, nn.ConvTranspose2d)):
            continue
        left = net.get_submodule(name).weight
        if name in ALONE:
            was = before[f"{name}.weight"].flatten(1).norm(dim=1)
            torch.testing.assert_close(left.flatten(1).norm(dim=1), was)
            assert not torch.allclose(part.weight.flatten(1).norm(dim=1), was)
        else:
            assert torch.equal(left, part.weight)


def test_outputs_stay_where_variances_are_hardly_more_than_epsilon(net):
    net.norm_b.eps = 0.5
    example = torch.randn(2, 3, 9, 9)
    recording = trace(net, example).recording
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net.b.weight.mul_(3)
        wanted = net(example)
        restore_lengths(net, recording, before)
        torch.testing.assert_close(net(example), wanted, rtol=1e-4, atol=1e-4)
    nearer = net.b.weight.abs().sum() < 3 * before["b.weight"].abs().sum()
    assert nearer and (net.norm_b.running_var >= 0).all()


def test_channels_of_no_length_and_variances_of_nothing_stay_finite(net):
    recording = trace(net, torch.randn(2, 3, 9, 9)).recording
    with torch.no_grad():
        net.a.weight[0] = 0
        net.norm_a.running_var[1] = 0
    before = {name: value.clone() for name, value in net.state_dict().items()}
    with torch.no_grad():
        net.a.weight.mul_(2)
        net.b.weight[3] = 0
    restore_lengths(net, recording, before)
    assert all(torch.isfinite(value).all() for value in net.state_dict().values())
    assert (net.norm_a.running_var >= 0).all() and not net.b.weight[3].any()
