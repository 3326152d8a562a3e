"""What a file of ``torch.save`` (or a relative of it) holds, told without running any of it.

In: a path. Out: :class:`Contents`: the tensors, or what else there is and how to get tensors out of
it. ``torch.load(weights_only=True)`` refuses a pickle that would run code; the classes that such a
pickle asks for are read from its opcodes, and none is imported.
"""

from __future__ import annotations

import pickle
import pickletools
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from prune2deploy.errors import ModelError

VALUES, OBJECTS, SCRIPT, EXPORTED = "values", "objects", "script", "exported"
_MARKS = {  # files that one kind of archive alone holds
    "constants.pkl": SCRIPT,
    "archive_format": EXPORTED,
    "serialized_exported_program.json": EXPORTED,  # before torch 2.8
}
_CODE = ("GLOBAL", "REDUCE", "BUILD", "Unsupported class")  # what torch refuses to run
_PICKLES = 4  # that an old file begins with: a mark, a version, facts of the machine, the object
_COMMON = ("torch.", "collections.", "builtins.", "__builtin__.")  # of nearly every pickle
_STATE = {
    VALUES: "torch.save(model.state_dict(), FILE)",
    OBJECTS: "torch.save(model.state_dict(), FILE)",
    SCRIPT: "torch.save(torch.jit.load(THIS).state_dict(), FILE)",
    EXPORTED: "torch.save(torch.export.load(THIS).state_dict, FILE)",
}


@dataclass(frozen=True, eq=False)
class Contents:
    """What a file holds.

    Attributes:
        kind: ``values`` (tensors and plain values), ``objects`` (pickled ones, which may run
            code), ``script`` (TorchScript) or ``exported`` (an archive of ``torch.export``).
        value: What was read; ``None`` for all but ``values``.
        classes: Names of the classes that pickled objects ask for, in order.
    """

    kind: str
    value: Any = None
    classes: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """It in words, for a message."""
        if self.kind == OBJECTS:
            own = [name for name in self.classes if not name.startswith(_COMMON)]
            return f"pickled Python objects ({', '.join((own or self.classes)[:3])})"
        if self.kind == VALUES and isinstance(self.value, Mapping):
            if self.value and all(isinstance(one, Tensor) for one in self.value.values()):
                return "a state dict"
            return f"a {type(self.value).__name__} with keys {sorted(map(str, self.value))[:5]}"
        words = {SCRIPT: "a TorchScript archive", EXPORTED: "an archive of torch.export"}
        return words.get(self.kind) or f"a {type(self.value).__name__}"

    @property
    def state(self) -> str:
        """The line that makes a state dict of what it holds."""
        return _STATE[self.kind]


def contents(path: Path) -> Contents:
    """Say what the file at ``path`` holds.

    Raises:
        ModelError: It cannot be read, is truncated, or is nothing that torch writes.
    """
    try:
        with path.open("rb") as file:
            file.read(1)
    except OSError as error:
        raise ModelError(
            f"{str(path)!r} cannot be read ({error.strerror or error}); expected a file that "
            "torch.save wrote and you may read"
        ) from error
    try:
        kinds = [kind for mark, kind in _MARKS.items() if mark in _members(path)]
        if kinds:
            return Contents(kinds[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on unusual pickle protocols
            return Contents(VALUES, torch.load(path, map_location="cpu", weights_only=True))
    except pickle.UnpicklingError as error:
        detail = str(error).rpartition("WeightsUnpickler error:")[2].partition("Please file")[0]
        if not any(word in detail for word in _CODE):
            raise ModelError(_broken(path, detail)) from error
        return Contents(OBJECTS, classes=tuple(dict.fromkeys(_classes(path))))
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise ModelError(_broken(path, f"{type(error).__name__}: {error}")) from error


def _members(path: Path) -> set[str]:
    """Names of the files in an archive, without folders; none where it is no archive."""
    if not zipfile.is_zipfile(path):
        return set()
    with zipfile.ZipFile(path) as archive:
        return {name.rpartition("/")[2] for name in archive.namelist()}


def _classes(path: Path) -> list[str]:
    """Names that the pickle of a file asks for."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as file:
            return [name for _ in range(_PICKLES) for name in _asked(file)]
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("data.pkl")]
        return [name for one in pickles for name in _asked(archive.open(one))]


def _asked(file: IO[bytes]) -> Iterator[str]:
    """Names that the pickle at the place of a stream asks for; none where there is no pickle."""
    texts: list[str] = []
    try:
        for code, argument, _ in pickletools.genops(file):
            if code.name == "GLOBAL":
                yield str(argument).replace(" ", ".")
            elif code.name == "STACK_GLOBAL":
                yield ".".join(texts[-2:])
            elif isinstance(argument, str):
                texts.append(argument)
    except ValueError:
        return


def _broken(path: Path, detail: str) -> str:
    line = " ".join(detail.split())
    return (
        f"{str(path)!r} ({path.stat().st_size} bytes) cannot be read: it is truncated or not "
        f"written by torch.save; copy it again. {line[:300]}{'…' if len(line) > 300 else ''}"
    )
