"""Files that are written whole or not at all, and what tells whole ones from others.

Files are written under a temporary name beside their own, then renamed.

A killed process or a full disk leaves at most a temporary file, never a half-written artefact
under its final name. Renaming is atomic because both names lie in the same folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a temporary file name to write; rename it to ``path`` when the block succeeds.

    The folder of ``path`` is made if it is missing. Files that the block writes beside the
    temporary one keep their names and are moved first, as it may refer to them. When the block
    raises, whatever it wrote is removed and what ``path`` held before is untouched.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a.txt"
    >>> with replacing(target) as temporary:
    ...     _ = temporary.write_text("whole")
    >>> target.read_text()
    'whole'
    """
    with scratch(path.parent) as folder:
        temporary = folder / path.name
        yield temporary
        for other in folder.iterdir():
            if other != temporary:
                other.replace(path.parent / other.name)
        temporary.replace(path)


@contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Make ``parent`` if needed and a temporary folder in it that goes when the block ends."""
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".part-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` whole or not at all, and onto the disk before the rename."""
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8 to ``path`` whole or not at all."""
    write_bytes(path, text.encode())


def sha256(*paths: Path) -> str:
    """SHA-256 of the contents of files, one after the other, in hexadecimal digits."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                digest.update(piece)
    return digest.hexdigest()
