"""Outputs of two models, wherever they are."""

import torch
from torch import nn

from prune2deploy.recover.distance import apart, outputs


def test_inputs_go_to_the_device_of_the_module():
    (made,) = outputs(nn.Linear(3, 2, device="meta"), [torch.ones(4, 3)])
    assert made.device.type == "meta" and made.shape == (4, 2)


def test_outputs_of_other_shapes_are_infinitely_far_apart():
    assert apart([torch.ones(2)], [torch.ones(3)]) == float("inf")
    assert apart([torch.ones(2)], [torch.full((2,), 2.0)]) == 0.25
