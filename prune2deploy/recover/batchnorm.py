"""BatchNorm re-estimation: the statistics of a pruned model from a few batches, no training.

In: a pruned module and calibration batches. Out: the module's running means and variances
replaced by the average over those batches, in place. Pruning changes what every layer sees; its
normalisation must follow. Source: Li et al., EagleEye, arXiv 2007.02491, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable
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
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and _tracks(m)]
    if not layers:
        return Reestimated(0, 0, "the model has no BatchNorm layer with running statistics")
    if batches is None:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    modes = {m: m.training for m in module.modules()}
    momenta = [layer.momentum for layer in layers]
    before = [_statistics(layer) for layer in layers]
    device = next(module.parameters()).device
    samples = 0
    module.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum = None  # cumulative average
        layer.train()
    try:
        with torch.no_grad():
            for inputs, _ in batches:
                module(*(one.to(device) for one in inputs))
                samples += len(inputs[0])
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for part, mode in modes.items():
            part.training = mode
        used = _keep_unseen(layers, before)
    if samples == 0:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    return Reestimated(used, samples)


def _tracks(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_var is not None


def _statistics(layer: _BatchNorm) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in layer.named_buffers()}


def _keep_unseen(layers: list[_BatchNorm], before: list[dict[str, Tensor]]) -> int:
    """Give layers that no batch reached their old statistics back; return how many were seen."""
    seen = 0
    for layer, old in zip(layers, before, strict=True):
        if layer.num_batches_tracked is not None and int(layer.num_batches_tracked) > 0:
            seen += 1
            continue
        for name, value in layer.named_buffers():
            value.copy_(old[name])
    return seen
