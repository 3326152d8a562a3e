"""What a run was asked for, checked once, frozen afterwards.

In: what the command line or a caller gave. Out: :class:`RunOptions` and :class:`SweepOptions`,
whose values every later stage may rely on. Nothing here reads files or imports a library.
"""

from __future__ import annotations

import difflib
import json
import math
import numbers
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from prune2deploy.errors import ConfigError
from prune2deploy.target import PRECISIONS

PERCENTILES = (50, 95, 99)
_BYTES = {"fp32": 4, "fp16": 2, "int8": 1}
_WEIGHTS = 0.98  # of a file, at least; names and structure are the rest
MOST_RATIOS = 1000  # of one sweep
MOST_SEED = 2**63 - 1  # the largest that all random generators accept
FILL = 0.97  # of the budget: a model measured at or above it wastes too little to go on


@dataclass(frozen=True)
class Budget:
    """The latency to meet: milliseconds, or a speed-up over the measured baseline.

    Attributes:
        latency_ms: Wall milliseconds of one inference, or ``None``.
        speedup: Baseline latency over wanted latency, or ``None``; exactly one of both is set.
        percentile: Which percentile of the measured latency must meet it (50, 95 or 99).

    Raises:
        ConfigError: Neither or both are given, or a value that no model can have.
    """

    latency_ms: float | None = None
    speedup: float | None = None
    percentile: int = 50

    def __post_init__(self) -> None:
        _plain_numbers(self)
        if (self.latency_ms is None) == (self.speedup is None):
            found = "neither" if self.latency_ms is None else "both"
            raise ConfigError(
                f"budget: found {found} of --latency-ms and --speedup, expected exactly one; "
                "give --latency-ms MS for a deadline or --speedup S for a factor"
            )
        _positive("--latency-ms", self.latency_ms)
        _positive("--speedup", self.speedup)
        if self.speedup is not None and self.speedup <= 1:
            raise ConfigError(
                f"--speedup: found {self.speedup:g}, expected a factor above 1 (1.5 means that "
                "the pruned model takes two thirds of the time)"
            )
        if self.percentile not in PERCENTILES:
            raise ConfigError(f"--percentile: found {self.percentile}, expected 50, 95 or 99")
        if self.speedup is not None and self.percentile != 50:
            raise ConfigError(
                f"--percentile {self.percentile} goes with --latency-ms; a speed-up is the ratio "
                "of medians, so leave --percentile out or name the budget in milliseconds"
            )

    @property
    def label(self) -> str:
        """Short name for folders and titles: ``20ms`` or ``1.5x``."""
        if self.speedup is not None:
            return f"{self.speedup:g}x"
        return f"{self.latency_ms:g}ms"


@dataclass(frozen=True)
class ModelOptions:
    """Which model, at which input, in which precision.

    Attributes:
        model: Specification as the loaders read it (``resnet18``, ``timm:NAME``, ...).
        weights: File with a state dict, or ``None`` for what the specification implies.
        input_size: Height and width in pixels, or ``None`` for the model's own.
        batch: Samples per inference.
        precision: ``fp32``, ``fp16``, ``int8``, or ``None`` for the target's.
        seed: Of random weights, random plans and random inputs.
        keep: Names or patterns of layers whose outputs keep all their channels; see ``graph.keep``.
        keep_class: Whether widths stay that the model's code cannot follow; ``surgery.classes``.
    """

    model: str = "resnet50"
    weights: Path | None = None
    input_size: tuple[int, int] | None = None
    batch: int = 1
    precision: str | None = None
    seed: int = 0
    keep: tuple[str, ...] = ()
    keep_class: bool = False

    def __post_init__(self) -> None:
        _plain_numbers(self)
        if not self.model.strip():
            raise ConfigError("--model: found an empty name, expected one such as resnet50")
        if not all(name.strip() for name in self.keep):
            raise ConfigError("--keep: found an empty name, expected that of a layer")
        at_least("--batch", self.batch, 1)
        at_least("--seed", self.seed, 0)
        if self.seed > MOST_SEED:
            raise ConfigError(f"--seed: found {self.seed}, expected at most {MOST_SEED}")
        if self.precision is not None:
            one_of("--precision", self.precision, PRECISIONS)


@dataclass(frozen=True)
class RunOptions:
    """Everything that decides what ``run`` does.

    Attributes:
        budget: What to meet.
        model: What to prune.
        target: Name or path of the target profile.
        data: Calibration recipe by name or path, or ``None`` to work without data.
        importance: Name of the criterion that chooses channels.
        finetune_epochs: Epochs of the built-in fine-tuning; 0 leaves it out.
        max_builds: Engine builds allowed besides the baseline.
        probes: Of these, random plans that the latency model is fitted on.
        max_drop: Largest top-1 accuracy to lose to fp16 or int8, as a fraction of 1; ``None`` has
            the difference of the outputs decide.
        max_size_mb: Greatest size of the weights in megabytes (10**6 bytes), or ``None``.
        max_macs: Greatest number of multiply-accumulates of one inference, or ``None``.
        max_pruning_ratio: Largest fraction of its channels that any layer loses, or ``None``; with
            one, no block goes either.
        cache: Whether timings of earlier runs on the device are used, and those of this one kept.
    """

    budget: Budget
    target: str
    model: ModelOptions = field(default_factory=ModelOptions)
    data: str | None = None
    importance: str = "l2"
    finetune_epochs: int = 0
    max_builds: int = 8
    probes: int = 3
    max_drop: float | None = None
    cache: bool = True
    max_size_mb: float | None = None
    max_macs: int | None = None
    max_pruning_ratio: float | None = None

    def __post_init__(self) -> None:
        _plain_numbers(self)
        at_least("--max-builds", self.max_builds, 1)
        at_least("--finetune", self.finetune_epochs, 0)
        at_least("probes", self.probes, 0)
        _positive("--max-size-mb", self.max_size_mb)
        _positive("--max-macs", self.max_macs)
        drop, ratio = self.max_drop, self.max_pruning_ratio
        if drop is not None and not (is_number(drop) and 0 <= drop < 1):
            raise ConfigError(
                f"--max-drop: found {drop!r}, expected a fraction from 0 up to but not "
                "including 1, such as 0.01 for one per cent"
            )
        if ratio is not None and not (is_number(ratio) and 0 < ratio < 1):
            raise ConfigError(
                f"--max-pruning-ratio: found {ratio!r}, expected a fraction above "
                "0 and below 1, such as 0.75 for layers that keep at least a quarter"
            )
        if self.finetune_epochs and self.data is None:
            raise ConfigError(
                f"--finetune {self.finetune_epochs}: found no data to train on, expected "
                "--data RECIPE; add it, or leave --finetune out"
            )

    def max_params(self, precision: str) -> int | None:
        """How many parameters ``max_size_mb`` allows in a precision; the rest of a file is small.

        >>> RunOptions(Budget(speedup=2), "ort", max_size_mb=10).max_params("fp16")
        4900000
        """
        if self.max_size_mb is None:
            return None
        return int(self.max_size_mb * 1e6 * _WEIGHTS / _BYTES[precision])

    @property
    def least(self) -> float:
        """Smallest fraction of its channels that a layer keeps."""
        return 0.0 if self.max_pruning_ratio is None else 1 - self.max_pruning_ratio

    def identity(self) -> dict[str, object]:
        """Plain values that must agree for one run to go on from another."""
        found = _plain(self)
        del found["max_builds"]  # more builds than before is a reason to go on, not an obstacle
        del found["cache"]  # what was recalled is in the journal
        for limit in ("max_size_mb", "max_macs", "max_pruning_ratio"):
            if found[limit] is None:
                del found[limit]
        return found


@dataclass(frozen=True)
class SweepOptions:
    """What ``sweep`` measures.

    Attributes:
        model: What to prune.
        target: Name or path of the target profile.
        ratios: Fractions of the channels to remove, each in [0, 1).
        importance: Name of the criterion that chooses channels.
        data: Calibration recipe by name or path, or ``None`` to work without data.
    """

    target: str
    ratios: tuple[float, ...]
    model: ModelOptions = field(default_factory=ModelOptions)
    importance: str = RunOptions.importance
    data: str | None = None

    def identity(self) -> dict[str, object]:
        """Plain values that must agree for one sweep to go on from another."""
        return _plain(self)


def _plain(options: RunOptions | SweepOptions) -> dict[str, Any]:
    """All values as JSON holds them; without what is not to be kept, as in older runs."""
    found: dict[str, Any] = json.loads(json.dumps(asdict(options), default=str))
    model = found["model"]
    found["model"] = {k: v for k, v in model.items() if v or k not in ("keep", "keep_class")}
    return found


def _plain_numbers(options: Budget | ModelOptions | RunOptions) -> None:
    """Make the numbers of other libraries, such as ``np.float32``, those of Python."""
    for one in fields(options):
        value = getattr(options, one.name)
        if is_number(value) and not isinstance(value, bool):
            plain = int(value) if isinstance(value, numbers.Integral) else float(value)
            object.__setattr__(options, one.name, plain)


def parse_size(text: str) -> tuple[int, int]:
    """Read ``HxW``, or ``S`` for a square, in pixels.

    >>> parse_size("320x640")
    (320, 640)
    >>> parse_size("320")
    (320, 320)

    Raises:
        ConfigError: Anything else.
    """
    match = re.fullmatch(r"(\d{1,5})(?:[xX](\d{1,5}))?", text.strip())
    height, width = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not height or not width:
        raise ConfigError(f"--input-size: found {text!r}, expected HxW such as 320x640, or 320")
    return height, width


def parse_ratios(text: str) -> tuple[float, ...]:
    """Read ``START:STOP:STEP`` (both ends included) or a list with commas.

    >>> parse_ratios("0:0.3:0.1")
    (0.0, 0.1, 0.2, 0.3)
    >>> parse_ratios("0.25,0.5")
    (0.25, 0.5)

    Raises:
        ConfigError: Not numbers, a step that leads nowhere, or a ratio outside [0, 1).
    """
    try:
        given = [float(part) for part in text.split(":" if ":" in text else ",")]
    except ValueError:
        given = []
    ratios = _spread(given, text) if ":" in text else sorted(set(given))
    if not ratios or not all(0 <= r < 1 for r in ratios):
        raise ConfigError(
            f"--ratios: found {text!r}, expected START:STOP:STEP or a list with commas, "
            "each from 0 up to but not including 1, such as 0:0.9:0.1"
        )
    return tuple(ratios)


def _spread(given: list[float], text: str) -> list[float]:
    if len(given) != 3 or not all(map(math.isfinite, given)):
        return []
    start, stop, step = given
    if step <= 0 or stop < start:
        return []
    steps = (stop - start) / step + 1e-6
    if steps >= MOST_RATIOS:
        raise ConfigError(f"--ratios: found {text!r}, expected at most {MOST_RATIOS} ratios")
    return [round(start + i * step, 9) for i in range(int(steps) + 1)]


def whole(value: float) -> int:
    """A count that may be written as ``1.5e9``.

    Raises:
        ConfigError: It is not finite, or below 1.
    """
    if not math.isfinite(value) or value < 1:
        raise ConfigError(f"--max-macs: found {value:g}, expected a finite number, at least 1")
    return int(value)


def one_of(what: str, found: str, choices: Iterable[str]) -> str:
    """Return ``found`` if it is among ``choices``; ``what`` names the option in the error.

    Raises:
        ConfigError: It is not; the nearest names are offered.
    """
    known = sorted(choices)
    if found in known:
        return found
    near = difflib.get_close_matches(str(found), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(near)}? " if near else ""
    raise ConfigError(f"{what}: found {found!r}; {hint}expected one of {', '.join(known)}")


def check_max_drop(max_drop: float | None, precision: str, *, data: bool) -> None:
    """Raise ConfigError where accuracy is to decide but cannot: no data, or nothing to decide."""
    if max_drop is None:
        return
    if not data:
        raise ConfigError("--max-drop needs labelled data: add --data RECIPE")
    if precision == "fp32":
        raise ConfigError(
            f"--max-drop {max_drop:g}: found precision fp32, which costs no accuracy, expected "
            "--precision fp16 or int8; leave --max-drop out otherwise"
        )


def _positive(what: str, value: float | None) -> None:
    if value is None:
        return
    if not (is_number(value) and math.isfinite(value) and value > 0):
        raise ConfigError(f"{what}: found {value!r}, expected a finite number above 0")


def is_number(value: object) -> bool:
    """Whether a value is a real number, of whatever library."""
    return isinstance(value, numbers.Real)


def at_least(what: str, value: Any, least: int) -> None:
    """Raise ConfigError where ``value`` is no whole number of at least ``least``."""
    if not isinstance(value, numbers.Integral) or value < least:
        raise ConfigError(f"{what}: found {value!r}, expected a whole number, at least {least}")
