"""Readers: where samples come from, one at a time, so that memory stays flat.

In: a recipe and what the model takes. Out: a :class:`Reader`: a length, and sample number i as
(arrays without batch dimension, label or ``None``). Reading number i twice gives the same.
"""

from __future__ import annotations

import difflib
import importlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from typing_extensions import override

from prune2deploy.calibration import arrays as array_files
from prune2deploy.calibration import classes, code, pictures
from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.calibration.recipe import Recipe
from prune2deploy.errors import ConfigError, MissingBackend
from prune2deploy.places import expanded

_TELLING = 4096  # first bytes of a picture that, with its size, tell it from others

Array = npt.NDArray[Any]
Sample = tuple[tuple[Array, ...], int | None]


class Reader(ABC):
    """Samples by number.

    Attributes:
        labelled: Whether its samples have labels.
        place: Where the samples are from, for messages.
        classes: How many classes labels are counted among, or ``None`` if that is not known.
        told: How many samples are enough to tell its content, where reading is dear; or ``None``.
    """

    labelled: bool
    place: str
    classes: int | None = None
    told: int | None = None

    @abstractmethod
    def __len__(self) -> int:
        """Return how many samples there are."""

    @abstractmethod
    def read(self, number: int) -> Sample:
        """Return sample ``number``; raises ConfigError, naming the file, where it is wrong."""

    def label(self, number: int) -> int | None:
        """Return the label of sample ``number``, without its inputs where that is cheaper."""
        return self.read(number)[1]

    def name(self, number: int) -> str:
        """Return what to call sample ``number`` in a message."""
        return f"{self.place}: sample {number}"

    def content(self, number: int) -> bytes:
        """Return what tells sample ``number`` from others: its name, or its content if cheap."""
        return self.name(number).encode()


class PictureReader(Reader):
    """Picture files of a folder and its sub-folders, without labels."""

    labelled = False

    def __init__(self, folder: Path, how: Preprocessing) -> None:
        if not folder.is_dir():
            raise ConfigError(f"{folder}: not a folder; expected one with pictures")
        self.place = str(folder)
        self._how = how
        self._files = self._listed(folder)
        if not self._files:
            below = "class sub-folders with pictures" if self.labelled else "pictures"
            raise ConfigError(
                f"{folder}: holds no picture; expected {below} ({', '.join(pictures.SUFFIXES)})"
            )

    def _listed(self, folder: Path) -> list[tuple[Path, int | None]]:
        """Every picture with its label."""
        return [(file, None) for file in _files(folder)]

    def __len__(self) -> int:
        return len(self._files)

    @override
    def name(self, number: int) -> str:
        return str(self._files[number][0])

    @override
    def label(self, number: int) -> int | None:
        return self._files[number][1]

    @override
    def content(self, number: int) -> bytes:
        path, label = self._files[number]
        try:
            with path.open("rb") as file:
                start = file.read(_TELLING)
        except OSError as error:
            raise ConfigError(
                f"{path}: cannot be read ({error.strerror or error}); remove the file or replace it"
            ) from error
        return f"{path}\0{label}\0{path.stat().st_size}\0".encode() + start

    @override
    def read(self, number: int) -> Sample:
        path, label = self._files[number]
        return (pictures.read(path, self._how),), label


def _files(folder: Path) -> list[Path]:
    found = (Path(base) / name for base, _, names in os.walk(folder) for name in names)
    return sorted(path for path in found if path.suffix.lower() in pictures.SUFFIXES)


class ClassReader(PictureReader):
    """Picture files with labels: one sub-folder per class.

    Classes are numbered in the order of their folders' names, as ImageNet's are, or as a list of
    these names says, one per line: then some folders may be missing.
    """

    labelled = True

    def __init__(self, folder: Path, how: Preprocessing, names: Path | None = None) -> None:
        self._names = names
        super().__init__(folder, how)

    @override
    def _listed(self, folder: Path) -> list[tuple[Path, int | None]]:
        found = sorted(p.name for p in folder.iterdir() if p.is_dir() and p.name[0] != ".")
        names = found if self._names is None else classes.read(self._names)
        for name in found:
            if name not in names:
                near = difflib.get_close_matches(name, names, n=3)
                raise ConfigError(
                    f"{folder / name}: a class that {self._names} does not list; nearest: "
                    f"{', '.join(near) or 'none'}; it lists one folder per line, in the order "
                    "of the model's scores"
                )
        self.classes = len(names)
        numbers = {name: number for number, name in enumerate(names)}
        return [(file, numbers[name]) for name in found for file in _files(folder / name)]


class ArrayReader(Reader):
    """Arrays of an ``.npy`` or ``.npz`` file, taken as the model's inputs as they are.

    Files that are not compressed are mapped, not loaded, however large they are.
    """

    def __init__(self, path: Path, inputs: tuple[str, ...], labels: str | None) -> None:
        self.place = str(path)
        stored = array_files.open_file(path)
        names = inputs or tuple(n for n in stored if n != (labels or "labels"))[:1]
        labels = labels or ("labels" if "labels" in stored else None)
        for name in (*names, *((labels,) if labels else ())):
            if name not in stored:
                raise ConfigError(
                    f"{path}: holds no array {name!r}; found {', '.join(stored) or 'none'}"
                )
        self._inputs = [stored[name] for name in names]
        self._labels = stored[labels] if labels else None
        self.labelled = labels is not None
        lengths = {n: len(stored[n]) for n in (*names, *((labels,) if labels else ()))}
        if len(set(lengths.values())) != 1 or 0 in lengths.values():
            raise ConfigError(
                f"{path}: arrays have {lengths} samples; expected equally many, at least one"
            )
        if self._labels is not None and (
            self._labels.ndim != 1 or not np.issubdtype(self._labels.dtype, np.integer)
        ):
            raise ConfigError(
                f"{path}: labels have shape {self._labels.shape} and type {self._labels.dtype}; "
                "expected whole numbers, one per sample"
            )

    def __len__(self) -> int:
        return len(self._inputs[0])

    @override
    def label(self, number: int) -> int | None:
        return None if self._labels is None else int(self._labels[number])

    @override
    def content(self, number: int) -> bytes:
        return _told(self.read(number))

    @override
    def read(self, number: int) -> Sample:
        return tuple(np.array(array[number]) for array in self._inputs), self.label(number)


def _told(sample: Sample) -> bytes:
    """Types, shapes, label and values of a sample."""
    arrays, label = sample
    facts = [(array.shape, array.dtype.str) for array in arrays]
    return f"{facts}\0{label}\0".encode() + b"".join(array.tobytes() for array in arrays)


class SequenceReader(Reader):
    """A dataset of the user's: ``len(it)``, and ``it[i]`` = inputs or (inputs, label).

    Inputs are a tensor or array without batch dimension, already preprocessed, or a tuple of
    these for a model of several inputs (then with a label: ``((a, b), label)``).
    """

    told = 32

    def __init__(self, dataset: Any, place: str, *, inputs: int = 1) -> None:
        self.place = place
        self._data = dataset
        self._several = inputs > 1
        if len(dataset) < 1:
            raise ConfigError(f"{place}: the dataset is empty; expected at least one sample")
        self.labelled = self.read(0)[1] is not None

    def __len__(self) -> int:
        return len(self._data)

    @override
    def content(self, number: int) -> bytes:
        return _told(self.read(number))

    @override
    def read(self, number: int) -> Sample:
        item = self._item(number)
        inputs, label = item, None
        if isinstance(item, tuple) and len(item) == 2:
            pair = isinstance(item[1], (int, np.integer)) or (
                isinstance(item[1], Tensor) and item[1].ndim == 0
            )
            if pair or not self._several:
                inputs, label = item
        parts = inputs if isinstance(inputs, tuple) else (inputs,)
        try:
            return tuple(map(_array, parts)), None if label is None else _whole(label)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"{self.name(number)}: found {type(item).__name__}; expected inputs or (inputs, "
                f"label), inputs as tensors or arrays and the label as a whole number: {error}"
            ) from error

    def _item(self, number: int) -> Any:
        try:
            return self._data[number]
        except Exception as error:  # the user's code may raise anything
            raise ConfigError(
                f"{self.name(number)}: the dataset failed: {type(error).__name__}: {error}; "
                f"expected it to give every sample from 0 to {len(self) - 1}"
            ) from error


def _array(value: Any) -> Array:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _whole(label: Any) -> int:
    number = int(label)
    if number != label:
        raise ValueError(f"the label is {label!r}")
    return number


class DigitsReader(Reader):
    """The 1,797 hand-written digits that come with scikit-learn, as 8x8 pictures.

    Every fifth is for testing. Source: Alpaydin and Kaynak, "Optical Recognition of Handwritten
    Digits", UCI Machine Learning Repository, 1998.
    """

    labelled = True
    place = "scikit-learn's digits"

    def __init__(self, how: Preprocessing, split: str) -> None:
        try:
            datasets: Any = importlib.import_module("sklearn.datasets")
        except ImportError as error:
            raise MissingBackend(
                f"reader 'digits' needs scikit-learn, which cannot be imported ({error}); "
                "install it with: pip install scikit-learn"
            ) from error
        digits = datasets.load_digits()
        test = np.arange(len(digits.images)) % 5 == 0
        chosen = test if split == "test" else ~test
        self._pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        self._labels = digits.target[chosen]
        self._how = how

    def __len__(self) -> int:
        return len(self._labels)

    @override
    def read(self, number: int) -> Sample:
        return (pictures.from_bytes(self._pixels[number], self._how),), int(self._labels[number])


class RandomReader(Reader):
    """Random values in the shapes and types of the example inputs, as many as wanted."""

    labelled = False
    place = "random values"

    def __init__(self, examples: tuple[Tensor, ...], count: int, seed: int) -> None:
        self._examples = examples
        self._count = count
        self._seed = seed

    def __len__(self) -> int:
        return self._count

    @override
    def read(self, number: int) -> Sample:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + number)
        return tuple(self._draw(one[0], generator).numpy() for one in self._examples), None

    @staticmethod
    def _draw(example: Tensor, generator: torch.Generator) -> Tensor:
        if example.is_floating_point() or not example.numel():
            return torch.randn(example.shape, generator=generator).to(example.dtype)
        low, high = int(example.min()), int(example.max())
        drawn = torch.randint(min(low, 0), high + 1, example.shape, generator=generator)
        return drawn.to(example.dtype)


def open_reader(recipe: Recipe, how: Preprocessing, examples: tuple[Tensor, ...]) -> Reader:
    """Return the reader that ``recipe`` names.

    Raises:
        ConfigError: There is no data where the recipe says, or it is of another kind.
        MissingBackend: The library that reads it is not installed.
    """
    options = dict(recipe.options)
    folder, name = recipe.data or Path(), options.get("callable", "")
    names = tuple(part.strip() for part in options.get("inputs", "").split(",") if part.strip())
    table: dict[str, Callable[[], Reader]] = {
        "class-folders": lambda: ClassReader(folder, how, _beside(recipe, "classes")),
        "images": lambda: PictureReader(folder, how),
        "arrays": lambda: ArrayReader(folder, names, options.get("labels")),
        "callable": lambda: SequenceReader(code.dataset(recipe, name), name, inputs=len(examples)),
        "digits": lambda: DigitsReader(how, options.get("split", "train")),
        "random": lambda: RandomReader(examples, recipe.count, recipe.seed),
    }
    return table[recipe.reader]()


def _beside(recipe: Recipe, option: str) -> Path | None:
    """The file that an option names, relative to the recipe; ``None`` where it is not given."""
    given = dict(recipe.options).get(option)
    where = f"{recipe.path}:options.{option}"
    return None if given is None else recipe.path.parent / expanded(given, where)
