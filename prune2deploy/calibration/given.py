"""Data of either kind: what a recipe gave, or a caller's own batches.

In: an iterable of (inputs, labels). Out: what a stage needs of it: the first samples, batches of
another size, whether it serves a purpose. Errors here name no recipe where there may be none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from prune2deploy.calibration.batches import Batch, Batches
from prune2deploy.calibration.recipe import PURPOSES
from prune2deploy.errors import ConfigError

_FORM = (
    "a list (or a DataLoader) of batches (inputs, labels): inputs a tensor, or a tuple of them, "
    "whose first dimension counts the samples, labels a tensor or None"
)


class _Tupled:
    """Batches whose inputs are one tensor, as a DataLoader has them, with inputs as tuples."""

    def __init__(self, data: Iterable[Any]) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Batch]:
        yield from read(self._data)

    def __len__(self) -> int:
        return len(self._data) if isinstance(self._data, Sized) else sum(1 for _ in self._data)


def given_batches(data: Any) -> Any:
    """Return a caller's batches with inputs as tuples; what came of a recipe as it is.

    Raises:
        ConfigError: See :func:`check_form`.
    """
    check_form(data)
    return data if data is None or isinstance(data, Batches) else _Tupled(data)


def read(data: Iterable[Any]) -> Iterator[Batch]:
    """Give the batches of any data as (tuple of inputs, labels or None).

    Raises:
        ConfigError: One is no such pair.
    """
    for found in data:
        if not _is_batch(found):
            raise ConfigError(f"batches: found a batch that is {_told(found)}, expected {_FORM}")
        inputs, labels = found
        yield (inputs,) if isinstance(inputs, Tensor) else tuple(inputs), labels


def first(batches: Iterable[Batch], count: int) -> list[Batch]:
    """Return the first ``count`` samples in batches as they come, the last one cut; may be fewer.

    Reads no batch beyond those.
    """
    found: list[Batch] = []
    for inputs, labels in read(batches):
        kept = None if labels is None else labels[:count]
        found.append((tuple(one[:count] for one in inputs), kept))
        count -= len(inputs[0])
        if count <= 0:
            break
    return found


def filled(batches: Iterable[Batch], rows: int) -> Iterator[tuple[Tensor, ...]]:
    """Give the inputs of all samples in batches of exactly ``rows``, whatever size theirs is.

    A last batch that is not full is filled by repeating its samples from its first on. Holds no
    more than one batch of either size.
    """
    held: tuple[Tensor, ...] = ()
    for inputs, _ in batches:
        held = tuple(map(torch.cat, zip(held, inputs, strict=True))) if held else tuple(inputs)
        whole = len(held[0]) // rows * rows
        for start in range(0, whole, rows):
            yield tuple(one[start : start + rows] for one in held)
        held = tuple(one[whole:] for one in held)
    if held and len(held[0]):
        order = torch.arange(rows, device=held[0].device) % len(held[0])
        yield tuple(one[order.to(one.device)] for one in held)


def restarting(data: Any) -> Iterable[Batch]:
    """Return data that may be gone through again and again.

    Raises:
        ConfigError: It holds no batches, or is an iterator, which is empty after one pass.
    """
    if not isinstance(data, Iterable):
        raise ConfigError(f"batches: found a {type(data).__name__}, expected {_FORM}")
    if iter(data) is data:
        raise ConfigError(
            f"batches: found a {type(data).__name__}, which can be read once, expected batches "
            "that can be read more than once: give a list, a DataLoader or what else starts over"
        )
    return data


def check_form(data: object) -> None:
    """Check a caller's own batches by the first one; those of a recipe were when it was opened.

    Raises:
        ConfigError: They can be read only once, there are none, or they are not pairs of tensors
            and labels.
    """
    if data is None or isinstance(data, Batches):
        return
    if next(read(restarting(data)), None) is None:
        raise ConfigError(f"batches: found no batch, expected {_FORM}; give at least one sample")


def _is_batch(found: object) -> bool:
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        return False
    inputs, labels = found
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    return (
        isinstance(inputs, (tuple, list))
        and len(inputs) > 0
        and all(isinstance(one, Tensor) and one.ndim and len(one) for one in inputs)
        and (labels is None or isinstance(labels, Tensor))
    )


def _told(found: object) -> str:
    """An object in words: the types of what a sequence holds, the shape of a tensor."""
    if isinstance(found, Tensor):
        return f"a tensor of shape {tuple(found.shape)}"
    if isinstance(found, (tuple, list)):
        return f"a {type(found).__name__} of ({', '.join(map(_told, found))})"
    return type(found).__name__


IGNORED = -100  # label of a sample without one, which torch's ``cross_entropy`` leaves out


def are_classes(labels: Tensor | None, scores: Sequence[int]) -> bool:
    """Whether labels are classes that a model scores: a whole number for each sample, of several.

    Some samples, but not all, may be ``IGNORED``.

    Args:
        labels: Of one batch, or ``None``.
        scores: Shape of the model's first output for it.
    """
    if labels is None or len(scores) != 2 or scores[1] < 2 or tuple(labels.shape) != (scores[0],):
        return False
    whole = not (labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool)
    fits, left_out = (labels >= 0) & (labels < scores[1]), labels == IGNORED
    return whole and bool(fits.any()) and bool((fits | left_out).all())


def check_labels(data: object, outputs: Sequence[tuple[int, ...]]) -> None:
    """Check the labels of a recipe's data against a model's outputs.

    Args:
        data: What came of a recipe; a caller's own batches are not looked at.
        outputs: Shapes of the outputs; labels count classes only where the first is
            (batch, classes).

    Raises:
        ConfigError: A label is none of the model's classes.
    """
    if isinstance(data, Batches) and outputs and len(outputs[0]) == 2 and outputs[0][1] > 1:
        data.check_labels(outputs[0][1])


def require(data: object, purpose: str) -> None:
    """Check that data serves a purpose; only what a recipe gave says what it is for.

    Raises:
        ConfigError: It does not.
    """
    if isinstance(data, Batches):
        data.need(purpose)


def serves(data: object, purpose: str) -> bool:
    """Whether there is data for a purpose; a caller's own batches are for all of them."""
    assert purpose in PURPOSES, purpose
    return data is not None and (not isinstance(data, Batches) or purpose in data.purposes)


def notices(data: object) -> tuple[str, ...]:
    """What the user must be told of data; a caller's own batches say nothing."""
    return data.notices if isinstance(data, Batches) else ()
