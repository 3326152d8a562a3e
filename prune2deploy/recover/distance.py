"""How far the outputs of one model are from those of another.

In: modules and inputs, or their outputs. Out: the squared difference, relative to the energy of
what is wanted.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from prune2deploy.graph.calling import device_of, quiet, tensors_in


def outputs(module: nn.Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The floating-point tensors that a module in evaluation mode returns, as float32, in order.

    Inputs go to the module's own device.
    """
    device = device_of(module)
    with quiet(module):
        made = module(*(one.to(device) for one in inputs))
        return [t.float() for t in tensors_in(made) if t.is_floating_point()]


def apart(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """Mean over tensors of the squared difference, relative to ``wanted``'s energy.

    Infinite where shapes differ: the outputs are not comparable.
    """
    if [t.shape for t in found] != [t.shape for t in wanted]:
        return float("inf")
    each = [
        float((one - other).square().sum() / other.square().sum().clamp_min(1e-12))
        for one, other in zip(found, wanted, strict=True)
    ]
    return sum(each) / max(len(each), 1)
