"""Settings of the Python interface: their names and types, and what a run makes of them.

In: keyword arguments as a caller gave them. Out: :class:`~prune2deploy.config.RunOptions`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

from prune2deploy import config
from prune2deploy.config import Budget, ModelOptions, RunOptions
from prune2deploy.errors import ConfigError
from prune2deploy.importance import NAMES
from prune2deploy.progress import Progress

_FLAGS = ("cache", "resume", "keep_class")


class Held(TypedDict, total=False):
    """What else of a model is not to change.

    Attributes:
        keep_class: Leave the widths alone that the model's own code cannot follow, so that the
            result is of the model's class and not a captured graph (False).
    """

    keep_class: bool


class Extras(Held, total=False):
    """Less common settings of :func:`prune_to_budget`.

    Attributes:
        importance: Name of the criterion that chooses channels (``l2``).
        precision: ``fp32``, ``fp16`` or ``int8``; the target's unless given.
        batches: Calibration data: a DataLoader or a list of (inputs, labels or None), inputs one
            tensor or a tuple of them.
        percentile: That ``budget_ms`` is for: 50, 95 or 99.
        max_builds: Engine builds allowed besides the baseline (8).
        max_drop: Largest top-1 accuracy that ``fp16`` or ``int8`` may cost, as a fraction; needs
            ``batches`` with labels.
        max_size_mb: Cap on the size of the weights, in megabytes.
        max_macs: Cap on the multiply-accumulates of one inference.
        max_pruning_ratio: Largest fraction of its channels that any layer loses; no block
            goes then.
        keep: Names or patterns of layers whose outputs keep all their channels.
        keep_class: See :class:`Held`.
        input_names: Names of the inputs in the ONNX file; ``input`` unless given, or where there
            are several the names of the forward pass.
        output_names: Names of its outputs; made from the structure of the output unless given.
        cache: Use timings of earlier runs on the device, and keep those of this one (True).
        seed: Of random plans (0).
        run_dir: Where to write; ``runs/...`` in the working folder unless given.
        resume: Go on with the run that ``run_dir`` holds; without it, with the newest of the same
            model, data and settings in ``runs``.
        progress: Hears of every step.
    """

    importance: str
    precision: str | None
    batches: Any
    percentile: int
    max_builds: int
    max_drop: float | None
    max_size_mb: float | None
    max_macs: int | None
    max_pruning_ratio: float | None
    keep: Sequence[str] | None
    input_names: Sequence[str] | None
    output_names: Sequence[str] | None
    cache: bool
    seed: int
    run_dir: Path | str | None
    resume: bool
    progress: Progress | None


def check(who: str, given: Mapping[str, Any], kind: type) -> None:
    """Raise ConfigError at a setting that ``who`` does not know, or a flag that is no boolean.

    Args:
        who: The function that was called.
        given: Its keyword arguments.
        kind: The ``TypedDict`` of its settings.
    """
    for key, value in given.items():
        config.one_of(who, key, kind.__annotations__)
        if key in _FLAGS and not isinstance(value, bool):
            raise ConfigError(f"{key}: found {value!r}, expected True or False")


def _check_kinds(extras: Extras) -> None:
    """Raise ConfigError at an unknown setting, or one of the wrong type."""
    check("prune_to_budget", extras, Extras)
    place, progress = extras.get("run_dir"), extras.get("progress")
    if not isinstance(place, str | os.PathLike | None):
        raise ConfigError(f"run_dir: found {place!r}, expected the path of a folder")
    if progress is not None and not callable(progress):
        raise ConfigError(f"progress: found {progress!r}, expected a function that takes a Step")


def names(what: str, given: Sequence[str] | None) -> tuple[str, ...]:
    """Names that the caller gave; a lone string is one name, not its letters."""
    names = (given,) if isinstance(given, str) else given or ()
    if not isinstance(names, Iterable) or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{what}: found {names!r}, expected names as text")
    return tuple(names)


def options(
    name: str, target: str, budget: tuple[float | None, float | None], extras: Extras
) -> RunOptions:
    """What a run is to do, of the settings that a caller of the Python interface gave.

    Args:
        name: Of the model's class.
        target: Name or path of the target profile.
        budget: Milliseconds and speed-up, of which one is ``None``.
        extras: The other settings.

    Raises:
        ConfigError: A setting is unknown, or has a wrong value.
    """
    _check_kinds(extras)
    return RunOptions(
        Budget(*budget, extras.get("percentile", 50)),
        target,
        ModelOptions(
            name,
            precision=extras.get("precision"),
            seed=extras.get("seed", 0),
            keep=names("keep", extras.get("keep")),
            keep_class=extras.get("keep_class", False),
        ),
        importance=config.one_of(
            "importance", extras.get("importance", RunOptions.importance), NAMES
        ),
        max_builds=extras.get("max_builds", RunOptions.max_builds),
        max_drop=extras.get("max_drop"),
        cache=extras.get("cache", True),
        max_size_mb=extras.get("max_size_mb"),
        max_macs=extras.get("max_macs"),
        max_pruning_ratio=extras.get("max_pruning_ratio"),
    )
