"""Weights that are stored with their length apart keep the values of what stays of them.

Weight normalisation (Salimans and Kingma, "Weight Normalization", NIPS 2016) computes a weight as
``g * v / |v|``. Taking entries out of ``v`` alone would stretch those that stay, so ``g`` shrinks
by as much as the norm does, and each kept weight is what it was. That holds for lengths over the
first dimension, the default, which torch records as one operator; over others, kept weights are
stretched to the length that the whole had.

Spectral normalisation (Miyato et al., "Spectral Normalization for Generative Adversarial Networks",
ICLR 2018) divides a weight by ``u · (W v)``, with stored vectors that training follows up. What is
left of them gives less, so ``u`` grows by as much, until training estimates both anew.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prune2deploy.graph.recording import Operation, Recording, Ref, refs_in
from prune2deploy.surgery.flows import FLOWS

Kept = Mapping[str, list[npt.NDArray[np.int64] | None]]
NORMALISING = frozenset({"aten::_weight_norm_interface", "aten::_weight_norm"})
INNER = frozenset({"aten::dot", "aten::vdot"})
MOVING = frozenset(name for name, flow in FLOWS.items() if flow.moves)


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
    if not any(operation.name in INNER for operation in recording.operations):
        return found
    formulas = _Formulas(recording)
    for weight, vector, length in formulas.divided():
        if any(positions is not None for positions in kept[weight]):
            whole = formulas.computed(length, stored.__getitem__)
            left = formulas.computed(length, lambda name: _left(stored[name], kept[name]))
            found[vector] = 1 / _ratio(whole, left).view(1)
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


class _Formulas:
    """How numbers are computed from stored tensors."""

    def __init__(self, recording: Recording) -> None:
        self._operations = recording.operations
        self._maker = {number: made[-1] for number, made in recording.makers().items()}
        self._names = {number: name for name, number in reversed(recording.stored.items())}
        self._reads: Counter[int] = recording.reads()

    def divided(self) -> Iterator[tuple[str, str, int]]:
        """Weights that are divided by ``u · (W v)``: their name, that of ``u``, and that number.

        Nothing else reads ``u``; a layer that is called twice divides twice.
        """
        found = list(self._divisions())
        passed = Counter((weight, number) for weight, _, path in found for number in path)
        for weight, length, path in found:
            if all(self._reads[number] == passed[weight, number] for number in path):
                yield weight, self._names[path[-1]], length

    def _divisions(self) -> Iterator[tuple[str, int, list[int]]]:
        """Each such division: the weight's name, the number, and the way from the product to u."""
        for operation in self._operations:
            refs = refs_in(operation.args)
            if operation.name != "aten::div" or len(refs) != 2 or refs[0].number not in self._names:
                continue
            inner = self._maker.get(refs[1].number)
            if inner is None or inner.name not in INNER:
                continue
            for u, product in (refs_in(inner.args), refs_in(inner.args)[::-1]):
                made = self._maker.get(product.number)
                if made is None or made.name != "aten::mv":
                    continue
                matrix, v = (self._path(ref.number) for ref in refs_in(made.args))
                path, weight = self._path(u.number), self._names[refs[0].number]
                if path and v and matrix and self._names[matrix[-1]] == weight:
                    yield weight, refs[1].number, path

    def _path(self, number: int) -> list[int]:
        """From a value to the stored tensor whose entries it holds; empty if it holds others."""
        path = [number]
        while path[-1] not in self._names:
            operation = self._maker.get(path[-1])
            refs = [] if operation is None else refs_in(operation.args)
            if operation is None or operation.name not in MOVING or len(refs) != 1:
                return []
            path.append(refs[0].number)
        return path

    def computed(self, number: int, stored: Callable[[str], Tensor]) -> Tensor:
        """The value that stored tensors give."""
        if number in self._names:
            return stored(self._names[number]).detach().double()
        operation = self._maker[number]
        args = tree_map_only(Ref, lambda ref: self.computed(ref.number, stored), operation.args)
        result: Tensor = operation.func(*args, **operation.kwargs)
        return result
