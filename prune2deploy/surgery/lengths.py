"""Weights that are stored as a direction and a length keep the length of what stays of them.

Weight normalisation (Salimans and Kingma, "Weight Normalization", NIPS 2016) computes a weight as
``g * v / |v|``. Taking entries out of ``v`` alone would stretch those that stay, so ``g`` shrinks
by as much as the norm does, and each kept weight is what it was. That holds for lengths over the
first dimension, the default, which torch records as one operator; over others, kept weights are
stretched to the length that the whole had.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prune2deploy.graph.calling import stored_tensors
from prune2deploy.graph.recording import Operation, Recording, refs_in

Kept = Mapping[str, list[npt.NDArray[np.int64] | None]]
NORMALISING = frozenset({"aten::_weight_norm_interface", "aten::_weight_norm"})


def shrinkage(module: nn.Module, recording: Recording, kept: Kept) -> dict[str, torch.Tensor]:
    """What each stored length is multiplied by, in its own shape before it is sliced.

    Args:
        module: As it is before its tensors are sliced.
        recording: Its forward pass.
        kept: Per stored tensor and dimension, the positions that stay (``None``: all).
    """
    stored = dict(stored_tensors(module))
    found: dict[str, torch.Tensor] = {}
    for operation in recording.operations:
        if operation.name not in NORMALISING:
            continue
        v, g = (recording.values[ref.number].weight for ref in refs_in(operation.args)[:2])
        if v is not None and g is not None and any(p is not None for p in kept[v]):
            found[g] = _ratio(stored[v], kept[v], _dim(operation)).view_as(stored[g])
    return found


def _dim(operation: Operation) -> int:
    """The dimension that has a length for each of its entries; the first unless told."""
    told = operation.args[2:] or operation.kwargs.values()
    return next(iter(told), 0)


def _ratio(v: torch.Tensor, kept: list[npt.NDArray[np.int64] | None], dim: int) -> torch.Tensor:
    """Norm of what stays over the norm of all, per entry of ``dim``; one where all is zero."""
    whole = left = v.detach().double().movedim(dim, 0)
    order = [dim % v.dim(), *(d for d in range(v.dim()) if d != dim % v.dim())]
    for place, old in enumerate(order[1:], start=1):
        positions = kept[old]
        if positions is not None:
            left = left.index_select(place, torch.as_tensor(positions, device=v.device))
    norm = whole.flatten(1).norm(dim=1)
    ratio = left.flatten(1).norm(dim=1) / norm
    return torch.where(norm > 0, ratio, 1.0).to(v.dtype)
