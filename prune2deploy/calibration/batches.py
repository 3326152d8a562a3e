"""Batches of samples: streamed, the same on every pass, checked against the model.

In: a recipe and the model it is for. Out: :class:`Batches`, which may be iterated over again and
again, holding one batch at a time.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.calibration.readers import Array, Reader, SequenceReader, open_reader
from prune2deploy.calibration.recipe import LABELLED, PICTURES, PURPOSES, Recipe, load_recipe
from prune2deploy.errors import ConfigError

Batch = tuple[tuple[Tensor, ...], Tensor | None]


class ForModel(Protocol):
    """What is needed to know of a model: its example inputs and its preprocessing."""

    @property
    def example_inputs(self) -> tuple[Tensor, ...]:
        """What the model takes, with a batch dimension first."""

    @property
    def preprocessing(self) -> Preprocessing | None:
        """How pictures become its input, if known."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Batches of (inputs, labels): ``for inputs, labels in batches: model(*inputs)``.

    ``len()`` is the number of batches; the last may be smaller. Every pass gives the same.

    Attributes:
        name: Of the recipe.
        purposes: What the data may be used for.
        labelled: Whether labels are there; they are of shape (batch,), int64.
        batch: Samples per batch.
        chosen: Numbers of the samples, in order.
        notices: What the user must be told of this data.
        sha256: Of the recipe's text and the content of the chosen samples, to key caches by.
    """

    name: str
    purposes: tuple[str, ...]
    batch: int
    chosen: tuple[int, ...]
    notices: tuple[str, ...]
    sha256: str
    _reader: Reader
    _shapes: tuple[tuple[int, ...], ...]
    _dtypes: tuple[torch.dtype, ...]

    @property
    def labelled(self) -> bool:
        """Whether the samples have labels."""
        return self._reader.labelled

    @property
    def count(self) -> int:
        """Number of samples."""
        return len(self.chosen)

    def __len__(self) -> int:
        return math.ceil(len(self.chosen) / self.batch)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self.chosen), self.batch):
            yield self._collate(self.chosen[start : start + self.batch])

    def rebatched(self, batch: int) -> Batches:
        """Return the same samples in batches of another size."""
        assert batch >= 1, batch
        return replace(self, batch=batch)

    def first(self, count: int) -> Batches:
        """Return the first ``count`` samples (all, if there are fewer)."""
        return replace(self, chosen=self.chosen[: max(count, 1)])

    def shuffled(self, seed: int) -> Batches:
        """Return the same samples in another order, which ``seed`` decides."""
        order = np.random.default_rng(seed).permutation(self.chosen)
        return replace(self, chosen=tuple(int(i) for i in order))

    def need(self, purpose: str) -> Batches:
        """Return this data if it serves ``purpose``.

        Raises:
            ConfigError: The recipe does not list the purpose, or it needs labels and has none.
        """
        assert purpose in PURPOSES, purpose
        if purpose not in self.purposes:
            raise ConfigError(
                f"recipe {self.name!r} is not for {purpose!r}; found purposes "
                f"{', '.join(self.purposes)}; add it to its purposes or choose another recipe"
            )
        if purpose in LABELLED and not self.labelled:
            raise ConfigError(_unlabelled(self.name, self._reader, purpose))
        return self

    def check_labels(self, classes: int) -> None:
        """Check every label against a model that gives scores for ``classes`` classes.

        Raises:
            ConfigError: Classes are counted among more or fewer, or a label is none of 0 to
                ``classes - 1``; names the sample.
        """
        if self._reader.classes not in (None, classes):
            raise ConfigError(
                f"{self._reader.place}: found {self._reader.classes} classes; the model gives "
                f"{classes} scores, so labels would name other classes than it was trained on. "
                "List all of its classes in their order, one per line, in a file that "
                "options.classes of the recipe names, or leave labels out with reader 'images'"
            )
        for number in self.chosen if self.labelled else ():
            label = self._reader.label(number)
            if label is not None and not 0 <= label < classes:
                raise ConfigError(
                    f"{self._reader.name(number)}: found label {label}, expected 0 to "
                    f"{classes - 1}, as the model gives {classes} scores; classes are counted "
                    "from 0, and data of another set of classes is better given without labels"
                )

    def _collate(self, numbers: tuple[int, ...]) -> Batch:
        inputs: list[list[Tensor]] = [[] for _ in self._shapes]
        labels: list[int] = []
        for number in numbers:
            arrays, label = self._reader.read(number)
            self._check(arrays, number)
            for column, array, dtype in zip(inputs, arrays, self._dtypes, strict=True):
                native = np.array(array, array.dtype.newbyteorder("="), order="C")
                column.append(self._typed(torch.from_numpy(native), dtype, number))
            if label is not None:
                labels.append(label)
        if self.labelled and len(labels) != len(numbers):
            raise ConfigError(
                f"{self._reader.place}: {len(numbers) - len(labels)} of {len(numbers)} samples "
                "have no label, though the first one has; give all of them one, or none"
            )
        stacked = tuple(torch.stack(column) for column in inputs)
        return stacked, torch.tensor(labels) if self.labelled else None

    def _typed(self, values: Tensor, dtype: torch.dtype, number: int) -> Tensor:
        """A sample's values in the type that the model takes, which must hold them."""
        typed = values.to(dtype)
        if not dtype.is_floating_point and not torch.equal(typed.to(values.dtype), values):
            raise ConfigError(
                f"{self._reader.name(number)}: found {values.dtype}, from {values.min()} to "
                f"{values.max()}; the model takes {dtype}, which does not hold all of these values"
            )
        return typed

    def _check(self, arrays: tuple[Array, ...], number: int) -> None:
        for array in arrays:
            if array.dtype.kind not in "biuf" or array.dtype.itemsize > 8:
                raise ConfigError(
                    f"{self._reader.name(number)}: found values of type {array.dtype}; expected "
                    "whole or floating-point numbers of at most 64 bits; store them as such"
                )
        found = tuple(tuple(array.shape) for array in arrays)
        if found != self._shapes:
            raise ConfigError(
                f"{self._reader.name(number)}: found {_shown(found)}; the model takes "
                f"{_shown(self._shapes)} per sample; change the recipe's preprocessing or the "
                "model's input size"
            )
        for array in arrays:
            if array.dtype.kind == "f" and not np.isfinite(array).all():
                raise ConfigError(f"{self._reader.name(number)}: holds values that are not finite")


def open_recipe(path_or_name: str | Path, model: ForModel) -> Batches:
    """Open the data that a recipe describes, for one model.

    Args:
        path_or_name: A shipped recipe's name, or the path of a TOML file.
        model: A loaded model; its example inputs say which shapes and types are wanted, and its
            preprocessing is used wherever the recipe says nothing else.

    Raises:
        ConfigError: The recipe, or the first sample of its data, is wrong; names file and key.
        MissingBackend: The library that reads the data is not installed.
    """
    recipe = load_recipe(path_or_name)
    how, notices = _preprocessing(recipe, model)
    if recipe.reader in PICTURES:
        _check_channels(recipe, how)
    reader = open_reader(recipe, how, model.example_inputs)
    for purpose in recipe.purposes if recipe.purposes_given else ():
        if purpose in LABELLED and not reader.labelled:
            raise ConfigError(_unlabelled(str(recipe.path), reader, purpose))
    if recipe.reader == "random":
        notices += (
            f"recipe {recipe.name!r} gives RANDOM data: int8 ranges, BatchNorm statistics and "
            "importance taken from it say nothing of real inputs, and accuracy will suffer; "
            "use real samples for anything that is deployed",
        )
    if len(reader) < recipe.count:
        notices += (
            f"recipe {recipe.name!r} asks for {recipe.count} samples; {reader.place} has "
            f"{len(reader)}, all of which are used",
        )
    return _batches(recipe, reader, model.example_inputs, notices)


def from_dataset(
    dataset: Any, example_inputs: Tensor | tuple[Tensor, ...], *, batch: int = 32, seed: int = 0
) -> Batches:
    """Make batches of any dataset with ``len()`` and indexing, such as torch's map-style ones.

    Args:
        dataset: ``dataset[i]`` is inputs or (inputs, label), preprocessed, without batch
            dimension.
        example_inputs: What the model takes, one tensor or several, with a batch dimension first.
        batch: Samples per batch.
        seed: Decides the order.

    Raises:
        ConfigError: The dataset is empty or does not fit the model, or a batch of less than 1.
    """
    place = type(dataset).__name__
    if not isinstance(batch, int) or batch < 1:
        raise ConfigError(f"batch: found {batch!r}, expected a whole number, at least 1")
    examples = (example_inputs,) if isinstance(example_inputs, Tensor) else tuple(example_inputs)
    reader = SequenceReader(dataset, place, inputs=len(examples))
    recipe = Recipe(
        name=place,
        reader="callable",
        data=None,
        count=len(dataset),
        batch=batch,
        seed=seed,
        purposes=PURPOSES,
        preprocessing=(),
        options=(),
        text="",
        path=Path(place),
    )
    return _batches(recipe, reader, examples, ())


def _batches(
    recipe: Recipe, reader: Reader, examples: tuple[Tensor, ...], notices: tuple[str, ...]
) -> Batches:
    for example in examples:
        if not example.ndim:
            raise ConfigError(
                f"{recipe.path}: the model takes a number without dimensions, which cannot come in "
                "batches of samples; make it one of shape (batch,), or part of the model"
            )
    order = np.random.default_rng(recipe.seed).permutation(len(reader))[: recipe.count]
    chosen = tuple(int(i) for i in order)
    digest = hashlib.sha256(recipe.text.encode())
    for place, number in enumerate(chosen):
        told = reader.told is None or place < reader.told
        digest.update((reader.content(number) if told else reader.name(number).encode()) + b"\0")
    opened = Batches(
        name=recipe.name,
        purposes=recipe.purposes,
        batch=recipe.batch,
        chosen=chosen,
        notices=notices,
        sha256=digest.hexdigest(),
        _reader=reader,
        _shapes=tuple(tuple(one.shape[1:]) for one in examples),
        _dtypes=tuple(one.dtype for one in examples),
    )
    arrays, _ = reader.read(chosen[0])
    opened._check(arrays, chosen[0])
    return replace(opened, notices=(*notices, *_unscaled(reader, arrays, examples)))


def _unscaled(
    reader: Reader, arrays: tuple[Array, ...], examples: tuple[Tensor, ...]
) -> tuple[str, ...]:
    """What to tell of whole numbers that a model takes as floating-point ones: pixels, likely."""
    return tuple(
        f"{reader.place}: holds {array.dtype}, from {array.min()} to {array.max()} in one sample; "
        "the model takes floating-point numbers and is fed these as they are: scale them as in "
        "its training"
        for array, example in zip(arrays, examples, strict=True)
        if array.dtype.kind in "iu" and example.is_floating_point()
    )


def _preprocessing(recipe: Recipe, model: ForModel) -> tuple[Preprocessing, tuple[str, ...]]:
    notices: tuple[str, ...] = ()
    own = model.preprocessing
    example = model.example_inputs[0]
    given = dict(recipe.preprocessing)
    if own is None:
        size = tuple(example.shape[-2:]) if example.ndim == 4 else (224, 224)
        channels = example.shape[1] if example.ndim == 4 else 3
        own = Preprocessing(
            size=(size[0], size[1]),
            mean=(0.0,) * channels,
            std=(1.0,) * channels,
            channel_order="gray" if channels == 1 else "rgb",
        )
        missing = [f.name for f in fields(own) if f.name in ("mean", "std") and f.name not in given]
        if missing and recipe.reader in ("class-folders", "images"):
            notices = (
                f"the model's own preprocessing is not known and recipe {recipe.name!r} gives no "
                f"{' and '.join(missing)}: pictures are fed as values in 0..1",
            )
    if given.get("channel_order") == "gray":
        own = replace(own, mean=own.mean[:1], std=own.std[:1])
    return replace(own, **given), notices


def _check_channels(recipe: Recipe, how: Preprocessing) -> None:
    """Raise ConfigError unless there are as many means and deviations as a picture has channels."""
    channels = 1 if how.channel_order == "gray" else 3
    for key, values in (("mean", how.mean), ("std", how.std)):
        if len(values) not in (1, channels):
            raise ConfigError(
                f"{recipe.path}:preprocessing.{key}: found {len(values)} numbers for "
                f"{channels} channels ({how.channel_order})"
            )


def _shown(shapes: tuple[tuple[int, ...], ...]) -> str:
    return " and ".join(str(shape) for shape in shapes)


def _unlabelled(where: str, reader: Reader, purpose: str) -> str:
    return (
        f"{where}: purpose {purpose!r} needs labels, but {reader.place} has none; use reader "
        "'class-folders', an array of labels, or a callable that returns (inputs, label)"
    )
