"""BatchNorm re-estimation: the statistics of a pruned model from a few batches, no training.

In: a pruned module and calibration batches. Out: the module's running means and variances
replaced by the average over those batches, in place. Pruning changes what every layer sees; its
normalisation must follow. Source: Li et al., EagleEye, arXiv 2007.02491, section 3.2.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune2deploy.calibration import Batch
from prune2deploy.graph.calling import device_of
from prune2deploy.modes import evaluating


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


def reestimate_batchnorm(module: nn.Module, batches: Iterable[Batch] | None) -> Reestimated:
    """Replace the running statistics by the average over ``batches``, in place.

    Every batch counts by its size and contributes its own variance, so batches should not be
    small; where a layer sees a single value per channel, it has no variance to learn from it.
    Weights, momenta and the mode of every submodule are as before afterwards; all but the
    BatchNorm layers stay in eval mode meanwhile, so that dropout does not disturb. Deterministic.

    Args:
        module: Its BatchNorm layers that track statistics are changed.
        batches: (inputs, labels or ``None``); inputs go to the module's own device. ``None`` or
            no batch leaves the module as it is, and so does a forward pass that fails.

    Returns:
        How many layers and samples; ``note`` says why nothing was done.
    """
    layers = [m for m in module.modules() if isinstance(m, _BatchNorm) and _tracks(m)]
    if not layers:
        return Reestimated(0, 0, "the model has no BatchNorm layer with running statistics")
    if batches is None:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    momenta = [layer.momentum for layer in layers]
    before = [{name: value.clone() for name, value in m.named_buffers()} for m in layers]
    averaging = _Averaging()
    hooks = [m.register_forward_pre_hook(averaging.weigh, with_kwargs=True) for m in layers]
    try:
        with evaluating(module):
            samples = _feed(module, batches)
    except BaseException:
        for layer, old in zip(layers, before, strict=True):
            layer.load_state_dict(old, strict=False)
        raise
    finally:
        for hook in hooks:
            hook.remove()
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
    if samples == 0:
        return Reestimated(0, 0, "no data: BatchNorm statistics are left as they were")
    return Reestimated(len(averaging.seen), samples)


class _Averaging:
    """Weighs each batch that a BatchNorm layer sees by the values that it has per channel.

    Attributes:
        seen: Values per channel so far, by layer.
    """

    def __init__(self) -> None:
        self.seen: Counter[nn.Module] = Counter()

    def weigh(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before a forward pass: the momentum that makes the statistics the average of all."""
        assert isinstance(layer, _BatchNorm)
        given = args[0] if args else kwargs["input"]
        values = given.numel() // given.shape[1]
        layer.training = values > 1
        if layer.training:
            if layer not in self.seen:
                layer.reset_running_stats()
            self.seen[layer] += values
            layer.momentum = values / self.seen[layer]


def _feed(module: nn.Module, batches: Iterable[Batch]) -> int:
    """Run all batches; return the number of samples."""
    device = device_of(module)
    samples = 0
    with torch.no_grad():
        for inputs, _ in batches:
            module(*(one.to(device) for one in inputs))
            samples += len(inputs[0])
    return samples


def _tracks(layer: _BatchNorm) -> bool:
    return layer.running_mean is not None and layer.running_var is not None
