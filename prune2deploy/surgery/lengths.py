"""Weights that are stored with their length apart keep the values of what stays of them.

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
from torch import Tensor

from prune2deploy.graph.recording import Operation, Recording, refs_in

Kept = Mapping[str, list[npt.NDArray[np.int64] | None]]
NORMALISING = frozenset({"aten::_weight_norm_interface", "aten::_weight_norm"})


def rescaled(stored: Mapping[str, Tensor], recording: Recording, kept: Kept) -> dict[str, Tensor]:
    """What stored lengths and vectors are multiplied by, in their shapes before they are sliced.

    Args:
        stored: Every stored tensor, in the shape that it had in the recording.
        recording: The forward pass.
        kept: Per stored tensor and dimension, the positions that stay (``None``: all).
    """
    found: dict[str, Tensor] = {}
    for operation in recording.operations:
        if operation.name not in NORMALISING:
            continue
        v, g = (recording.values[ref.number].weight for ref in refs_in(operation.args)[:2])
        if v is not None and g is not None and any(p is not None for p in kept[v]):
            dim = _dim(operation)
            norms = (
                whole.detach().double().movedim(dim, 0).flatten(1).norm(dim=1)
                for whole in (stored[v], _left(stored[v], kept[v]))
            )
            found[g] = _ratio(*norms).view(stored[g].shape)
    return found


def _dim(operation: Operation) -> int:
    """The dimension that has a length for each of its entries; the first unless told."""
    told = operation.args[2:] or operation.kwargs.values()
    return next(iter(told), 0)


def _ratio(whole: Tensor, left: Tensor) -> Tensor:
    """Of a length that is left to the whole; one where either is zero."""
    return torch.where((whole != 0) & (left != 0), left / whole, 1.0)


def _left(tensor: Tensor, kept: list[npt.NDArray[np.int64] | None]) -> Tensor:
    """The tensor with zeros in place of what goes."""
    left = tensor.detach().clone()
    for dim, positions in enumerate(kept):
        if positions is not None:
            gone = np.setdiff1d(np.arange(tensor.shape[dim]), positions)
            left.index_fill_(dim, torch.as_tensor(gone, device=tensor.device), 0)
    return left
