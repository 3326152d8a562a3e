"""Recipes: which data a model is given, read from ``calibration/*.toml`` into a frozen value.

In: the name of a shipped recipe or the path of a user's. Out: :class:`Recipe`, every key checked.
A recipe says where data lies and how it is treated; it never holds data.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune2deploy import places, shipped
from prune2deploy.errors import ConfigError

SCHEMA = 1  # 1: reader, path, count, batch, seed, purposes, preprocessing, options
PURPOSES = ("importance", "bn", "sensitivity", "int8", "parity", "finetune", "evaluate")
LABELLED = ("evaluate",)  # purposes that mean nothing without labels
READERS: Mapping[str, tuple[str, ...]] = {  # reader to the options that it knows
    "class-folders": ("classes",),
    "images": (),
    "arrays": ("inputs", "labels"),
    "callable": ("callable",),
    "digits": ("split",),
    "random": (),
}
PICTURES = ("class-folders", "images", "digits")  # readers that preprocess pictures
_NEEDS_PATH = ("class-folders", "images", "arrays")


@dataclass(frozen=True)
class Recipe:
    """What a calibration recipe says.

    Attributes:
        name: File name without ``.toml``.
        reader: One of ``READERS``.
        data: Folder or file that the data lies in; ``None`` for readers that need none.
        count: Samples to take at most.
        batch: Samples per batch.
        seed: Decides which samples are taken and in which order.
        purposes: What the data may be used for, from ``PURPOSES``.
        preprocessing: Fields of :class:`~prune2deploy.calibration.preprocessing.Preprocessing`
            that replace the model's own.
        options: Settings that only its reader knows.
        text: The TOML text as read.
        path: Where it was read from.
        purposes_given: Whether the recipe lists its purposes itself (otherwise: all).
    """

    name: str
    reader: str
    data: Path | None
    count: int
    batch: int
    seed: int
    purposes: tuple[str, ...]
    preprocessing: tuple[tuple[str, Any], ...]
    options: tuple[tuple[str, str], ...]
    text: str
    path: Path
    purposes_given: bool = False


def load_recipe(name_or_path: str | Path) -> Recipe:
    """Load a shipped recipe by name, or a recipe of your own by path.

    Raises:
        ConfigError: Unknown name (nearest names offered), or a file that is not a valid recipe
            (file:key, what was found, what was expected).
    """
    path = shipped.find("calibration", name_or_path)
    table, text = shipped.read_toml(path)
    shipped.check_keys(path, table, _CHECKS.keys())
    if "reader" not in table:
        raise ConfigError(f"{path}:reader: missing; expected one of {', '.join(READERS)}")
    _check(path, table, _CHECKS, "")
    preprocessing = dict(table.get("preprocessing", {}))
    shipped.check_keys(path, preprocessing, _PREPROCESSING.keys(), "preprocessing.")
    _check(path, preprocessing, _PREPROCESSING, "preprocessing.")
    return Recipe(
        name=path.stem,
        reader=table["reader"],
        data=_data(path, table),
        count=table.get("count", 256),
        batch=table.get("batch", 32),
        seed=table.get("seed", 0),
        purposes=tuple(table.get("purposes", PURPOSES)),
        preprocessing=tuple(sorted((k, _frozen(v)) for k, v in preprocessing.items())),
        options=_options(path, table),
        text=text,
        path=path,
        purposes_given="purposes" in table,
    )


def _is_whole(least: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and value >= least


def _is_size(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_whole(1), value))


def _are_numbers(value: Any) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (1, 3)
        and all(type(one) in (int, float) for one in value)
    )


def _are_purposes(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(one in PURPOSES for one in value)


_Check = tuple[Callable[[Any], bool], str]
_ORDERS = ("rgb", "bgr", "gray")
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")
_CHECKS: dict[str, _Check] = {
    "schema": (lambda v: v == SCHEMA, f"{SCHEMA}, the only version there is"),
    "description": (lambda v: isinstance(v, str), "text in quotes"),
    "reader": (lambda v: v in tuple(READERS), "one of " + ", ".join(READERS)),
    "path": (lambda v: isinstance(v, str) and bool(v), "the path of a folder or file, in quotes"),
    "count": (_is_whole(1), "a whole number of 1 or more"),
    "batch": (_is_whole(1), "a whole number of 1 or more"),
    "seed": (_is_whole(0), "a whole number of 0 or more"),
    "purposes": (_are_purposes, "a list of some of " + ", ".join(PURPOSES)),
    "preprocessing": (lambda v: isinstance(v, dict), "a table"),
    "options": (lambda v: isinstance(v, dict), "a table"),
}
_PREPROCESSING: dict[str, _Check] = {
    "size": (_is_size, "[height, width] in pixels"),
    "resize": (_is_whole(1), "the shorter side in pixels before the crop"),
    "letterbox": (lambda v: isinstance(v, bool), "true or false"),
    "mean": (_are_numbers, "a list of one number per channel"),
    "std": (
        lambda v: _are_numbers(v) and all(one > 0 for one in v),
        "a list of one number above 0 per channel",
    ),
    "channel_order": (lambda v: v in _ORDERS, "one of " + ", ".join(_ORDERS)),
    "interpolation": (lambda v: v in _INTERPOLATIONS, "one of " + ", ".join(_INTERPOLATIONS)),
    "upright": (lambda v: isinstance(v, bool), "true or false"),
}


def _check(path: Path, table: Mapping[str, Any], checks: Mapping[str, _Check], prefix: str) -> None:
    for key, value in table.items():
        fits, expected = checks[key]
        if not fits(value):
            raise ConfigError(f"{path}:{prefix}{key}: found {value!r}, expected {expected}")


def _frozen(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _data(path: Path, table: Mapping[str, Any]) -> Path | None:
    """Return the place of the data: ``$NAMES`` filled in, relative to the recipe's folder."""
    reader = table["reader"]
    if reader not in _NEEDS_PATH:
        if "path" in table:
            raise ConfigError(f"{path}:path: reader {reader!r} takes none; leave the line out")
        return None
    if "path" not in table:
        raise ConfigError(f"{path}:path: missing; reader {reader!r} expects a folder or file")
    text = os.path.expandvars(table["path"])
    unset = re.search(r"\$\{?(\w+)", text)
    if unset is not None:
        raise ConfigError(
            f"{path}:path: found {table['path']!r}, but the environment variable {unset[1]} is "
            f"not set; set it to where the data lies: export {unset[1]}=/path/to/data"
        )
    place = path.parent / places.expanded(text, f"{path}:path")
    if not place.exists():
        raise ConfigError(f"{path}:path: no such file or folder: {place}")
    return place


def _options(path: Path, table: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    options = table.get("options", {})
    shipped.check_keys(path, options, READERS[table["reader"]], "options.")
    for key, value in options.items():
        if not isinstance(value, str) or not value:
            raise ConfigError(f"{path}:options.{key}: found {value!r}, expected text in quotes")
    if table["reader"] == "callable" and ":" not in options.get("callable", ""):
        raise ConfigError(
            f"{path}:options.callable: found {options.get('callable')!r}, expected "
            "'package.module:callable', which returns a dataset"
        )
    if options.get("split", "test") not in ("train", "test"):
        raise ConfigError(
            f"{path}:options.split: found {options['split']!r}, expected 'train' or 'test'"
        )
    return tuple(sorted(options.items()))
