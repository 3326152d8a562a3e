"""BatchNorm re-estimation: the statistics of a pruned model from a few batches, no training.

In: a pruned module and calibration batches. Out: the module's running means and variances
replaced by the average over those batches, in place. Pruning changes what every layer sees; its
normalisation must follow. Source: Li et al., EagleEye, arXiv 2007.02491, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

Batch = tuple[tuple[Tensor, ...], Tensor | None]
Batches = Iterable[Batch]


@dataclass(frozen=True)
class Reestimated:
    """What :func:`reestimate_batchnorm` did.

    Attributes:
        layers: BatchNorm layers whose statistics were replaced.
        samples: Samples seen.
        note: Why nothing was done, or empty.
    """

    layers: int
    samples: int
    note: str = ""


def reestimate_batchnorm(module: nn.Module, batches: Batches | None) -> Reestimated:
    """Replace the running statistics by the cumulative average over ``batches``, in place.

    Every batch counts alike (momentum ``None``), so batches should be of equal size and not
    small: each contributes its own variance. Weights, momenta and the mode of every submodule
    are as before afterwards; all but the BatchNorm layers stay in eval mode meanwhile, so that
    dropout does not disturb. Deterministic.

    Args:
        module: Its BatchNorm layers that track statistics are changed.
        batches: (inputs, labels or ``None``); inputs go to the module's own device. ``None`` or
            no batch leaves the module as it is.

    Returns:
        How many layers and samples; ``note`` says why nothing was done.
    """
    if not any(_tracks(m) for m in module.modules()):
        return Reestimated(0, 0, "the model has no BatchNorm layer with running statistics")
    if batches is None:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    device = next(module.parameters()).device
    samples = 0
    with collecting(module) as layers, torch.no_grad():
        for inputs, _ in batches:
            module(*(one.to(device) for one in inputs))
            samples += len(inputs[0])
        seen = sum(int(layer.num_batches_tracked or 0) > 0 for layer in layers)
    if samples == 0:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    return Reestimated(seen, samples)


@contextmanager
def collecting(module: nn.Module) -> Iterator[list[_BatchNorm]]:
    """While active, every batch goes into new running statistics, the cumulative average.

    All but the BatchNorm layers are in eval mode meanwhile. On leaving, layers that saw no batch
    have their old statistics back, and momenta and modes are as before.

    Args:
        module: Its BatchNorm layers that track statistics are changed.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and _tracks(m)]
    modes = {m: m.training for m in module.modules()}
    momenta = [layer.momentum for layer in layers]
    before = [_statistics(layer) for layer in layers]
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    try:
        yield layers
    finally:
        for layer, momentum, old in zip(layers, momenta, before, strict=True):
            layer.momentum = momentum
            if not int(layer.num_batches_tracked or 0):
                for name, value in layer.named_buffers():
                    value.copy_(old[name])
        for part, mode in modes.items():
            part.training = mode


def _tracks(layer: nn.Module) -> bool:
    return isinstance(layer, _BatchNorm) and layer.running_mean is not None


def _statistics(layer: _BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}
