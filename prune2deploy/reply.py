"""What every sub-command shares: the form of its answer, and the refusal of useless options.

In: parsed arguments. Out: plain values. Nothing here reads files or imports a library.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune2deploy.errors import ConfigError


@dataclass(frozen=True)
class Reply:
    """What a sub-command answers.

    Attributes:
        text: For people.
        document: For programs; what JSON can hold.
        exit_code: See the errors of this package.
    """

    text: str
    document: Any
    exit_code: int = 0


def refuse(arguments: argparse.Namespace, names: str, why: str) -> None:
    """Raise ConfigError where an option is given that would do nothing.

    Args:
        arguments: Where options that are not given are ``None`` or ``False``.
        names: The attributes of those that do nothing, separated by spaces.
        why: When they do nothing, and what they are for.
    """
    for name in names.split():
        given = getattr(arguments, name)
        if given is not None and given is not False:
            option = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{option}: found it {why}; leave it out")


def shown(path: Path) -> str:
    """A path as a person reads it: relative where it lies in the working folder."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
