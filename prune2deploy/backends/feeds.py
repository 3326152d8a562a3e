"""Inputs of a session: whether all are there, and random ones for timing.

Random ones are fixed by a seed and never zero: zeros and tiny values would time another computation
(denormal numbers cost up to 26 times more, and some kernels skip zeros).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from prune2deploy.backends.base import Array, TensorSpec
from prune2deploy.errors import BackendError


def require(specs: Sequence[TensorSpec], feeds: Mapping[str, Array]) -> None:
    """Raise BackendError at the first input that was not given."""
    for spec in specs:
        if spec.name not in feeds:
            raise BackendError(
                f"the engine's input {spec.name!r} was not given; "
                f"found {', '.join(feeds) or 'none'}, expected {', '.join(s.name for s in specs)}"
            )


def random_feeds(specs: Sequence[TensorSpec], seed: int) -> dict[str, Array]:
    """Return one array per input: floats in 0.05..1 with random sign, integers in 0..7.

    Args:
        specs: Inputs of an engine; a dynamic dimension (-1) becomes 1.
        seed: The same seed gives the same arrays.
    """
    generator = np.random.default_rng(seed)
    feeds: dict[str, Array] = {}
    for spec in specs:
        shape = tuple(d if d > 0 else 1 for d in spec.shape)
        dtype = np.dtype(spec.dtype)
        if dtype.kind == "f":
            sign = generator.choice(np.array([-1.0, 1.0]), shape)
            feeds[spec.name] = np.asarray(sign * generator.uniform(0.05, 1.0, shape), dtype)
        elif dtype.kind == "b":
            feeds[spec.name] = np.ones(shape, dtype)
        else:
            feeds[spec.name] = np.asarray(generator.integers(0, 8, shape), dtype)
    return feeds
