"""Targets: where a model runs, read from ``targets/*.toml`` into a frozen value."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class MeasurePolicy:
    """How long and how precisely to measure on a target.

    Attributes:
        min_samples: Pairs to take before stopping may be considered.
        half_width: Wanted half-width of the 95 % interval, as a fraction (0.01 is one per cent).
        min_seconds: Least time that the blocks are spread over.
        max_seconds: Time cap of one comparison.
    """

    min_samples: int = 30
    half_width: float = 0.01
    min_seconds: float = 5.0
    max_seconds: float = 90.0


@dataclass(frozen=True)
class Target:
    """A device and runtime, with what is known of both.

    Attributes:
        name: File name without ``.toml``.
        backend: Key into the table of backends.
        device: What the backend calls the device (``cpu``, ``cuda:0``, ``GPU`` ...).
        precision: ``fp32``, ``fp16`` or ``int8``.
        channel_multiple: Width step that the target runs well at, or ``None`` to detect it.
        threads: Intra-operator threads; 0 leaves it to the runtime.
        description: One line for the table of targets.
        options: Settings that only its backend reads (providers, workspace, capability ...).
        measure: The measuring policy.
        text: The TOML text as read, kept in the journal.
        sha256: Of ``text``.
        path: Where it was read from.
    """

    name: str
    backend: str
    device: str
    precision: str
    channel_multiple: int | None
    threads: int
    description: str
    options: tuple[tuple[str, str | int | float | bool], ...]
    measure: MeasurePolicy
    text: str
    sha256: str
    path: Path
