"""Random inputs of a model, to time it on or to compare it on.

Fractions are never near zero: zeros hide errors, and would time another computation (denormal
numbers cost up to 26 times more, and some kernels skip zeros). Whole numbers are 0 or 1, which most
models take as tokens, classes, positions and masks alike; others mean something to one model only,
and are those of its example inputs where these are known.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

LEAST = 0.05  # magnitude of a fraction


def draw(
    wanted: Iterable[tuple[str, Sequence[int], npt.DTypeLike]],
    generator: np.random.Generator,
    example: Mapping[str, Array] | None = None,
) -> dict[str, Array]:
    """Draw inputs: fractions normally distributed, flags all true, whole numbers 0 or 1.

    Args:
        wanted: Name, shape and type of each.
        generator: Decides the values.
        example: Inputs that the model is known to take; all but fractions are taken from it.
    """
    known = whole(example or {})
    return {
        name: known[name].astype(dtype) if name in known else _random(shape, dtype, generator)
        for name, shape, dtype in wanted
    }


def whole(inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Those of some inputs that are no fractions."""
    return {name: array for name, array in inputs.items() if array.dtype.kind != "f"}


def _random(shape: Sequence[int], dtype: npt.DTypeLike, generator: np.random.Generator) -> Array:
    kind = np.dtype(dtype).kind
    if kind == "f":
        drawn = generator.standard_normal(shape)
        return np.asarray(drawn + np.copysign(LEAST, drawn), dtype)
    return (
        np.ones(shape, dtype) if kind == "b" else np.asarray(generator.integers(0, 2, shape), dtype)
    )
