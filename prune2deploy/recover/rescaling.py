"""Weights in front of a BatchNorm get their old lengths back; what the module computes stays.

In: a module whose weights were fitted, the recorded forward pass, the tensors as they were before.
Out: the module, changed in place.

What a BatchNorm gives does not depend on the length of the weights before it, as long as its
statistics follow. Training does: a step turns longer weights less far, as if the learning rate were
smaller by the square of the length (van Laarhoven, arXiv 1706.05350). Least squares makes weights
about twice as long, and training from there ends where it began.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.graph.calling import stored_tensors
from prune2deploy.graph.recording import Recording, Ref

_CONVOLUTION = torch.ops.aten.convolution.default
_NORM = torch.ops.aten.native_batch_norm.default
_MEAN, _VARIANCE, _EPSILON = 3, 4, 7  # of the arguments of a BatchNorm


@dataclass(frozen=True)
class _Pair:
    """Names of what a convolution and the only reader of its output store."""

    weight: str
    mean: str
    variance: str
    epsilon: float
    bias: str | None


def restore_lengths(module: nn.Module, recording: Recording, before: Mapping[str, Tensor]) -> int:
    """Scale the weights of each output channel back to their old length, and BatchNorm with them.

    Where a variance is not much more than its epsilon, they get nearer to it only.

    Args:
        module: The module that was fitted, pruned or not.
        recording: The forward pass of the unpruned one; both store their tensors by the same names.
        before: State of ``module`` before it was fitted.

    Returns:
        How many layers there were to give lengths back to.
    """
    stored = dict(stored_tensors(module))
    pairs = [p for p in _pairs(recording) if {p.weight, p.mean, p.variance} <= stored.keys()]
    with torch.no_grad():
        for pair in pairs:
            was, now = (_lengths(table[pair.weight]) for table in (before, stored))
            weight, variance = stored[pair.weight], stored[pair.variance]
            stretch = torch.where((was > 0) & (now > 0), now / was, 1.0)
            stretch = stretch.minimum((variance / pair.epsilon + 1).sqrt())  # none below zero
            weight.div_(stretch.view(-1, *(1,) * (weight.ndim - 1)))
            if pair.bias is not None:
                stored[pair.bias].div_(stretch)
            stored[pair.mean].div_(stretch)
            exact = (variance + pair.epsilon) / stretch.square() - pair.epsilon
            variance.copy_(exact.clamp_min(0))
    return len(pairs)


def adjustable(recording: Recording) -> frozenset[str]:
    """Names of the weights whose lengths :func:`restore_lengths` can restore."""
    return frozenset(pair.weight for pair in _pairs(recording))


def _lengths(weight: Tensor) -> Tensor:
    found: Tensor = weight.detach().flatten(1).norm(dim=1)
    return found


def _pairs(recording: Recording) -> Iterator[_Pair]:
    """Convolutions whose output a BatchNorm alone reads, with statistics of its own."""
    reads = recording.reads()

    def own(value: Any) -> str | None:
        """Name of a stored tensor that nobody else reads."""
        alone = isinstance(value, Ref) and reads[value.number] == 1
        return recording.values[value.number].weight if alone else None

    made = {one.outputs[0]: one.args for one in recording.operations if one.func is _CONVOLUTION}
    for norm in recording.operations:
        if norm.func is not _NORM or norm.args[0].number not in made:
            continue
        _, weight, bias, *_, transposed, _, _ = made[norm.args[0].number]
        stored, mean, variance = own(weight), own(norm.args[_MEAN]), own(norm.args[_VARIANCE])
        apart = not transposed and reads[norm.args[0].number] == 1
        if apart and stored and mean and variance and (bias is None or own(bias)):
            yield _Pair(stored, mean, variance, norm.args[_EPSILON], own(bias))
