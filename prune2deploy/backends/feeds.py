"""Inputs of a session: whether all are there, and random ones for timing.

Whole numbers that the model is known to take lie in a file of their own beside its ONNX file, as
engines are timed in other processes than the one that made them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from prune2deploy.atomic import replacing
from prune2deploy.backends.base import Array, TensorSpec
from prune2deploy.errors import BackendError
from prune2deploy.random_inputs import draw, whole


def require(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Raise BackendError at the first input that was not given."""
    for spec in specs:
        if spec.name not in feeds:
            raise BackendError(
                f"the engine's input {spec.name!r} was not given; "
                f"found {', '.join(feeds) or 'none'}, expected {', '.join(s.name for s in specs)}"
            )


def random_feeds(
    specs: Sequence[TensorSpec], seed: int, onnx: Path | None = None
) -> dict[str, Array]:
    """Return one array per input; see ``random_inputs``.

    Args:
        specs: Inputs of an engine; a dynamic dimension (-1) becomes 1.
        seed: The same seed gives the same arrays.
        onnx: The ONNX file of the engine, for what ``keep_example`` left beside it.
    """
    wanted = [(s.name, tuple(d if d > 0 else 1 for d in s.shape), s.dtype) for s in specs]
    return draw(wanted, np.random.default_rng(seed), {} if onnx is None else _example(onnx))


def keep_example(onnx: Path, example: Mapping[str, Array]) -> None:
    """Keep the whole numbers among example inputs, by name, beside an ONNX file."""
    known = whole(example)
    if known:
        with replacing(_place(onnx)) as path:
            np.savez(path, np.array(list(known)), *known.values())


def _example(onnx: Path) -> dict[str, Array]:
    if not _place(onnx).exists():
        return {}
    with np.load(_place(onnx), allow_pickle=False) as held:
        names, *arrays = held.values()
    return dict(zip(names.tolist(), arrays, strict=True))


def _place(onnx: Path) -> Path:
    return onnx.with_suffix(".example.npz")
