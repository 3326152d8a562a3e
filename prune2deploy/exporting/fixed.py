"""Places in a model's code where an exported file holds a value of the example for good.

In: a module that is traced, and its inputs. Out: places in its code. A tracer records operators;
where code asks a tensor for a number and goes on by that (``if x.sum() > 0``), only what followed
for the example is recorded. The tracer tells each such place, but also places that ask for sizes
alone, whose numbers are right in a file of fixed sizes. So the module runs once more untraced,
where sizes are plain numbers, and what counts are the places that read a value which was computed
from an input.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit._trace import TracerWarning  # torch.jit has it, but does not declare it
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from prune2deploy.graph.calling import quiet, tensors_in

Place = tuple[str, int]
"""File and line."""

FOLDERS = (Path(torch.__file__).parent, Path(__file__).parents[1])
LIBRARIES = (*(f"{folder}{os.sep}" for folder in FOLDERS), warnings.__file__)
"""Code that is not the model's: torch, this package, and what tells of warnings."""

SHOWN = 5  # places that a note names
CONVERTED = "Converting a tensor to"  # how the tracer begins to tell of a number that was asked for
TEMPLATES = ("aten::new_", "aten::zeros_like", "aten::ones_like", "aten::full_like")
"""Operators that take shape and type of a tensor, and not its values."""


@contextmanager
def told_by_tracer() -> Iterator[set[Place]]:
    """Collect the places where the tracer turns a tensor into a number, while the block runs."""
    places: set[Place] = set()
    with warnings.catch_warnings():
        warnings.filterwarnings("always", category=TracerWarning)
        others = warnings.showwarning

        def show(message: Any, category: Any, *where: Any) -> None:
            if not issubclass(category, TracerWarning):
                others(message, category, *where)
            elif str(message).startswith(CONVERTED):
                places.add(_place())

        warnings.showwarning = show  # type: ignore[assignment]  # called with positions only
        yield places


def note(module: nn.Module, inputs: tuple[Tensor, ...], told: set[Place]) -> str:
    """What a reader of an exported file should know of it, or an empty text.

    Args:
        module: It is run once if the tracer told of any place, and left as it was.
        inputs: What it was traced with.
        told: Where the tracer turned a tensor into a number.
    """
    reads = _Reads(inputs)
    if told:
        with quiet(module), reads:
            module(*inputs)
    fixed = sorted(told & reads.places)
    if not fixed:
        return ""
    return (
        f"the model's code goes on by values that depend on the input, at {_listed(fixed)}; the "
        "exported file holds only what the example inputs led to there, whatever it is given. "
        "Keep such values in tensors (torch.where, x / x.max()), or check that this is right"
    )


class _Reads(TorchDispatchMode):
    """Finds where code reads numbers out of tensors that were computed from the inputs.

    Attributes:
        places: Where it did.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.places: set[Place] = set()
        self._computed = WeakIdKeyDictionary(dict.fromkeys(inputs))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = (args, kwargs)
        if func._schema.name.startswith(TEMPLATES):
            return result
        if not any(tensor in self._computed for tensor in tensors_in(given)):
            return result
        made = list(tensors_in(result))
        if not made:
            self.places.add(_place())
        for tensor in made:
            self._computed[tensor] = None
            if tensor._base is not None and func._schema.is_mutable:  # what it is a part of changed
                self._computed[tensor._base] = None
        return result


def _place() -> Place:
    """The innermost line that runs now and is not a library's."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(LIBRARIES):
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


def _listed(places: Sequence[Place]) -> str:
    here = Path.cwd()
    shown = []
    for name, line in places[:SHOWN]:
        file = Path(name)
        shown.append(f"{file.relative_to(here) if file.is_relative_to(here) else file}:{line}")
    more = [f"{len(places) - SHOWN} more places"] if len(places) > SHOWN else []
    return ", ".join([*shown, *more])
