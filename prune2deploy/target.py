"""Targets: where a model runs, read from ``targets/*.toml`` into a frozen value.

In: the name of a shipped profile or the path of the user's own. Out: a checked ``Target``. What
the keys of ``[options]`` mean is the backend's business; it checks them when it is looked up.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from prune2deploy import shipped
from prune2deploy.errors import ConfigError

Option = str | int | float | bool

PRECISIONS = ("fp32", "fp16", "int8")
INT8_RANGES = ("minmax", "entropy", "percentile")
SCHEMA = 1  # 1: the keys of ``Target``, tables ``options`` and ``measure``


@dataclass(frozen=True)
class MeasurePolicy:
    """How long and how precisely to measure on a target.

    Attributes:
        min_samples: Pairs to take before stopping may be considered.
        half_width: Wanted half-width of the 95 % interval, as a fraction (0.01 is one per cent).
        min_seconds: Least time that the blocks are spread over.
        max_seconds: Time cap of one comparison.
        control: Whether to time the reference against a second copy of itself as well (A/A).
    """

    min_samples: int = 30
    half_width: float = 0.01
    min_seconds: float = 5.0
    max_seconds: float = 90.0
    control: bool = True


@dataclass(frozen=True)
class Target:
    """A device and runtime, with what is known of both.

    Attributes:
        name: File name without ``.toml``.
        backend: Key into the table of backends.
        device: What the backend calls the device (``cpu``, ``cuda:0``, ``GPU`` ...).
        precision: ``fp32``, ``fp16`` or ``int8``.
        channel_multiple: Width step that the target runs well at, or ``None`` to have it probed.
        threads: Intra-operator threads; 0 leaves it to the runtime.
        description: One line for the table of targets.
        options: Settings that only its backend reads (providers, workspace, capability ...).
        measure: The measuring policy.
        text: The TOML text as read, kept in the journal.
        sha256: Of ``text``.
        path: Where it was read from.
        int8_ranges: How ranges of activations are found; one of ``INT8_RANGES``.
    """

    name: str
    backend: str
    device: str
    precision: str
    channel_multiple: int | None
    threads: int
    description: str
    options: tuple[tuple[str, Option], ...]
    measure: MeasurePolicy
    text: str
    sha256: str
    path: Path
    int8_ranges: str = INT8_RANGES[0]

    def option(self, name: str, default: Option) -> Option:
        """Return the option ``name``, or ``default`` where the profile does not give it.

        Raises:
            ConfigError: The option has another type than ``default``.
        """
        value = dict(self.options).get(name, default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise ConfigError(
                f"{self.path}:options.{name}: found {value!r}, expected {_kind(type(default))}"
            )
        return value

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold."""
        return {**asdict(self), "path": str(self.path), "options": dict(self.options)}

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> Target:
        """Rebuild what ``to_dict`` gave."""
        parts = dict(values)
        parts["options"] = tuple(sorted(parts["options"].items()))
        parts["measure"] = MeasurePolicy(**parts["measure"])
        parts["path"] = Path(parts["path"])
        return Target(**parts)


def load(name_or_path: str | Path) -> Target:
    """Load a shipped target by name, or a profile of your own by path.

    Raises:
        ConfigError: Unknown name (nearest names offered), or a file that is not a valid profile
            (file:key, what was found, what was expected).
    """
    path = shipped.find("targets", name_or_path)
    table, text = shipped.read_toml(path)
    return _parse(path, table, text)


def load_all() -> tuple[Target, ...]:
    """Load every shipped target, sorted by name."""
    return tuple(load(path) for path in shipped.files("targets").values())


_REQUIRED: dict[str, type] = {"backend": str, "device": str}
_OPTIONAL: dict[str, type] = {
    "schema": int,
    "precision": str,
    "int8_ranges": str,
    "channel_multiple": int,
    "threads": int,
    "description": str,
    "options": dict,
    "measure": dict,
}
_NAMES = {
    str: "text in quotes",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "a table",
}


def _kind(kind: type) -> str:
    return _NAMES.get(kind, kind.__name__)


AUTO = "auto"
"""As a ``channel_multiple``: probe it, as where the line is left out."""


def _parse(path: Path, table: Mapping[str, Any], text: str) -> Target:
    if table.get("channel_multiple") == AUTO:
        table = {key: value for key, value in table.items() if key != "channel_multiple"}
    shipped.check_keys(path, table, [*_REQUIRED, *_OPTIONAL])
    for key, kind in _REQUIRED.items():
        if key not in table:
            raise ConfigError(f"{path}:{key}: missing; expected {_kind(kind)}")
    for key, value in table.items():
        _check_type(path, key, value, {**_REQUIRED, **_OPTIONAL}[key])
    _check_ranges(path, table)
    return Target(
        name=path.stem,
        backend=table["backend"],
        device=table["device"],
        precision=table.get("precision", "fp32"),
        channel_multiple=table.get("channel_multiple"),
        threads=table.get("threads", 0),
        description=table.get("description", ""),
        options=_options(path, table.get("options", {})),
        measure=_policy(path, table.get("measure", {})),
        text=text,
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        path=path,
        int8_ranges=table.get("int8_ranges", INT8_RANGES[0]),
    )


def _check_type(path: Path, key: str, value: object, kind: type) -> None:
    right = type(value) is kind or (kind is float and type(value) is int)
    if not right:
        raise ConfigError(f"{path}:{key}: found {value!r}, expected {_kind(kind)}")


def _check_ranges(path: Path, table: Mapping[str, Any]) -> None:
    checks = (
        ("schema", lambda v: v == SCHEMA, f"{SCHEMA}, the only version there is"),
        ("backend", bool, "the name of a backend"),
        ("device", bool, "what the backend calls the device, such as 'cpu' or 'cuda:0'"),
        ("precision", PRECISIONS.__contains__, "one of " + ", ".join(PRECISIONS)),
        ("int8_ranges", INT8_RANGES.__contains__, "one of " + ", ".join(INT8_RANGES)),
        (
            "channel_multiple",
            range(1, 257).__contains__,
            f'1 to 256, or "{AUTO}" to have it probed',
        ),
        ("threads", range(1025).__contains__, "0 (leave it to the runtime) to 1024"),
    )
    for key, fits, expected in checks:
        if key in table and not fits(table[key]):
            raise ConfigError(f"{path}:{key}: found {table[key]!r}, expected {expected}")


def _options(path: Path, table: Mapping[str, Any]) -> tuple[tuple[str, Option], ...]:
    for key, value in table.items():
        if type(value) not in (str, int, float, bool):
            raise ConfigError(
                f"{path}:options.{key}: found {value!r}, expected text, a number, true or false"
            )
    return tuple(sorted(table.items()))


def _policy(path: Path, table: Mapping[str, Any]) -> MeasurePolicy:
    defaults = {f.name: f.default for f in fields(MeasurePolicy)}
    shipped.check_keys(path, table, defaults, "measure.")
    for key, value in table.items():
        _check_type(path, f"measure.{key}", value, type(defaults[key]))
    policy = MeasurePolicy(**table)
    checks = (
        ("min_samples", policy.min_samples >= 2, "2 or more"),
        ("half_width", 0 < policy.half_width < 1, "a fraction between 0 and 1"),
        ("min_seconds", 0 <= policy.min_seconds < math.inf, "0 or more seconds"),
        (
            "max_seconds",
            policy.min_seconds <= policy.max_seconds < math.inf and policy.max_seconds > 0,
            "at least min_seconds, and more than 0",
        ),
    )
    for key, fits, expected in checks:
        if not fits:
            raise ConfigError(
                f"{path}:measure.{key}: found {getattr(policy, key)!r}, expected {expected}"
            )
    return policy
