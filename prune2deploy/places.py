"""Folders of the user: home, cache, and those that their modules are imported from.

In: a path as the user wrote it. Out: the path meant.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from prune2deploy.errors import ConfigError


def expanded(path: str | Path, where: str = "path") -> Path:
    """A path with ``~`` and ``~user`` replaced by the home folder.

    Args:
        path: As the user wrote it.
        where: What gives it (``file:key``), for the message.

    Raises:
        ConfigError: There is no such user, or no home folder.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{where}: found {str(path)!r}, whose home folder is not known; expected a path "
            "without ~, or that of a user of this machine"
        ) from error


def cache() -> Path:
    """The user's cache folder of this program: in ``$XDG_CACHE_HOME`` or ``~/.cache``."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return expanded(base, "XDG_CACHE_HOME") / "prune2deploy"


@contextlib.contextmanager
def importable(*folders: Path) -> Iterator[None]:
    """Have Python look for modules in these folders first, while this is open."""
    places = [str(folder) for folder in folders]
    sys.path[:0] = places
    try:
        yield
    finally:
        for place in places:
            with contextlib.suppress(ValueError):  # the user's code may have taken it out
                sys.path.remove(place)
