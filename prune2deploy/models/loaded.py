"""The value that every loader returns, and what it is asked for.

In: nothing. Out: :class:`Request`, :class:`LoadedModel`, and what loaders share: random inputs, and
names offered for one that is unknown.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune2deploy.calibration.preprocessing import Preprocessing


@dataclass(frozen=True)
class Request:
    """What a loader is asked for.

    Attributes:
        name: The model's name without the library's prefix.
        input_size: Height and width of the example input; ``None`` takes the library's own.
        batch: Size of the batch dimension of the example inputs.
        seed: For random weights and random inputs.
    """

    name: str
    input_size: tuple[int, int] | None = None
    batch: int = 1
    seed: int = 0

    def size(self, default: tuple[int, int]) -> tuple[int, int]:
        """Return the wanted (height, width), or ``default``."""
        return self.input_size or default

    def normal(self, *shape: int) -> Tensor:
        """Return seeded standard normal values of shape (batch, ``*shape``).

        The values do not depend on the global random state, and leave it as it is.
        """
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randn(self.batch, *shape, generator=generator)

    def integers(self, length: int, high: int) -> Tensor:
        """Return seeded integers in 0..``high``-1 of shape (batch, ``length``)."""
        generator = torch.Generator().manual_seed(self.seed)
        return torch.randint(high, (self.batch, length), generator=generator)


@dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready to be traced.

    Attributes:
        module: In eval mode, float32, on the CPU.
        example_inputs: What ``module(*example_inputs)`` takes.
        spec: The name that it was loaded by.
        library: Which loader made it.
        input_names: One per example input where the library knows them, else empty.
        output_names: One per output where the library knows them, else empty.
        preprocessing: How pictures become inputs, where the library knows it.
        random: Whether the weights are random, as no file of weights was named.
        notices: What the user must be told of the weights.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    spec: str
    library: str
    input_names: tuple[str, ...] = ("input",)
    output_names: tuple[str, ...] = ()
    preprocessing: Preprocessing | None = None
    random: bool = False
    notices: tuple[str, ...] = ()


def nearest(name: str, known: Sequence[str]) -> str:
    """Offer the names that are nearest to an unknown one, for a message."""
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    return f"the nearest are {', '.join(near)}" if near else "none is near it"
