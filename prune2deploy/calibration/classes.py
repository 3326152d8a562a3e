"""A list of classes: a text file with one name per line, in the order of the model's scores.

In: its path. Out: the names.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from prune2deploy.errors import ConfigError


def read(path: Path) -> list[str]:
    """Return the names in a file, which says by their order what number each class has.

    Raises:
        ConfigError: It cannot be read, or a name is in it twice.
    """
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{path}: cannot be read as a list of classes, one per line: {error}"
        ) from error
    names = [line.strip() for line in lines if line.strip()]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise ConfigError(
            f"{path}: found {twice[0]!r} more than once, expected each class on one line, in the "
            "order of the model's scores"
        )
    return names
