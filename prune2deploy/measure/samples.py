"""Raw samples of one comparison: what is kept in a file and replayed through the statistics.

History of the format: 1, the arrays and notes of ``Samples``.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prune2deploy.atomic import replacing
from prune2deploy.errors import ConfigError, MeasureError

SCHEMA = 1
Ints = npt.NDArray[np.int64]

WALL, CPU, DEVICE = 0, 1, 2
"""Columns of a sample."""
NOISE = ("wall_ns", "involuntary", "voluntary", "run_delay_ns", "pressure_us", "steal_ticks")
"""Columns of what is read about the host over one block."""


@dataclass(frozen=True, eq=False)
class Samples:
    """Interleaved samples in nanoseconds, in the order in which they were taken.

    Attributes:
        candidate: (pairs, 3): wall, thread CPU and device time of each run.
        reference: (pairs, 3): of the run beside it.
        twin: (pairs, 3): of a second copy of the reference (A/A control); (0, 3) without one.
        block: (pairs,): block number of each pair.
        noise: (blocks, 6): see ``NOISE``.
        notes: Why sampling stopped, warm-up, fingerprint: plain values for JSON.
    """

    candidate: Ints
    reference: Ints
    twin: Ints
    block: Ints
    noise: Ints
    notes: dict[str, Any]


_ARRAYS = ("candidate", "reference", "twin", "block", "noise")


def save(samples: Samples, path: Path) -> None:
    """Write samples to ``path`` (``.npz``); it appears under its name only when complete.

    Raises:
        ConfigError: It cannot be written; the disk may be full.
    """
    arrays = {name: getattr(samples, name) for name in _ARRAYS}
    notes = json.dumps({"schema": SCHEMA, **samples.notes})
    try:
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez_compressed(file, notes=np.array(notes), **arrays)
    except OSError as error:
        raise ConfigError(
            f"{path}: the raw samples cannot be written ({error.strerror or error}); free some "
            "space, or choose another folder with --out (run and sweep go on with --resume)"
        ) from error


def load(path: Path) -> Samples:
    """Read what ``save`` wrote.

    Raises:
        MeasureError: The file is missing, damaged, or of another schema.
    """
    try:
        with np.load(path, allow_pickle=False) as data:
            notes = json.loads(str(data["notes"]))
            arrays = {name: data[name] for name in _ARRAYS}
    except Exception as error:  # numpy and zipfile raise many unrelated types
        raise MeasureError(f"{path}: not a file of raw samples: {error!r}") from error
    if notes.pop("schema") != SCHEMA:
        raise MeasureError(f"{path}: another schema of raw samples, {SCHEMA} expected")
    return Samples(**arrays, notes=notes)
