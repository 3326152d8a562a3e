"""Array files: ``.npy`` and ``.npz``, mapped where they are not compressed, however large.

In: a path. Out: arrays by name.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from prune2deploy.errors import ConfigError

Array = npt.NDArray[Any]


def open_file(path: Path) -> dict[str, Array]:
    """Open the arrays of a file by name; the one of an ``.npy`` file is called ``inputs``.

    Raises:
        ConfigError: The file is neither kind, cannot be read, or holds Python objects or scalars.
    """
    try:
        if path.suffix == ".npy":
            arrays = {"inputs": np.load(path, mmap_mode="r", allow_pickle=False)}
        elif path.suffix == ".npz":
            arrays = dict(_members(path))
        else:
            raise ConfigError(f"{path}: found {path.suffix!r}; expected an .npy or .npz file")
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError) as error:
        raise ConfigError(
            f"{path}: cannot be read as numpy arrays (arrays of Python objects are refused): "
            f"{error}"
        ) from error
    for name, array in arrays.items():
        if array.ndim == 0:
            raise ConfigError(f"{path}: array {name!r} has no dimension to take samples along")
    return arrays


def _members(path: Path) -> Iterator[tuple[str, Array]]:
    """Map the arrays of an ``.npz`` file (a zip of ``.npy`` files); load those compressed."""
    with (
        path.open("rb") as file,
        zipfile.ZipFile(file) as parts,
        np.load(file, allow_pickle=False) as archive,
    ):
        for part in parts.infolist():
            name = part.filename.removesuffix(".npy")
            if part.compress_type != zipfile.ZIP_STORED:
                yield name, archive[name]
                continue
            with parts.open(part) as stream:
                version = np.lib.format.read_magic(stream)
                header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = header(stream)
                start = stream.tell()
            if dtype.hasobject:
                raise ConfigError(f"{path}: array {name!r} holds Python objects, which are refused")
            offset = _data_start(path, part.header_offset) + start
            order = "F" if fortran else "C"
            yield name, np.memmap(path, dtype, "r", offset, shape, order)  # type: ignore[call-overload]


def _data_start(path: Path, header: int) -> int:
    """Return where a zip member's data starts: its local header has two variable lengths."""
    with path.open("rb") as file:
        file.seek(header + 26)
        name, extra = (int.from_bytes(file.read(2), "little") for _ in range(2))
    return header + 30 + name + extra
