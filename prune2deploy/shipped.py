"""Find and read the TOML files that come with the package: ``targets`` and ``calibration``.

In: the name of a folder. Out: paths, and tables checked for syntax and keys. A wheel carries
the folders inside the package as ``_shipped/<folder>``; an editable install and a checkout have
them at the root of the repository, beside the package.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from prune2deploy.errors import ConfigError
from prune2deploy.places import expanded

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDERS = ("targets", "calibration")
_PACKAGE = Path(__file__).resolve().parent


def folder(kind: str) -> Path:
    """Return the folder that holds the shipped files of ``kind``.

    Args:
        kind: ``"targets"`` or ``"calibration"``.

    Raises:
        ConfigError: The folder is in neither place; the installation is damaged.
    """
    assert kind in FOLDERS, kind
    places = (_PACKAGE / "_shipped" / kind, _PACKAGE.parent / kind)
    for place in places:
        if place.is_dir():
            return place
    raise ConfigError(
        f"no folder {kind!r} found, expected {places[0]} (installed) or {places[1]} (checkout); "
        "install prune2deploy again"
    )


def files(kind: str) -> dict[str, Path]:
    """Return the shipped files of ``kind``: name without ``.toml`` to path, sorted by name."""
    return dict(sorted((path.stem, path) for path in folder(kind).glob("*.toml")))


def find(kind: str, name_or_path: str | Path) -> Path:
    """Return the path of a shipped file by name, or of a file of the user's own.

    Anything that ends in ``.toml`` or has a folder in it is a path; the rest is a name.

    Raises:
        ConfigError: No such file, or no such name (the nearest names are offered).
    """
    text = str(name_or_path)
    if text.endswith(".toml") or len(Path(text).parts) > 1:
        path = expanded(text, kind)
        if not path.is_file():
            raise ConfigError(f"{path}: no such file; expected a TOML file of {kind}")
        return path.resolve()
    known = files(kind)
    if text in known:
        return known[text]
    raise ConfigError(
        f"no {kind.rstrip('s')} named {text!r} found; {_nearest(text, known)}. A TOML file of "
        f"your own is given by its path (./{Path(text).stem or 'mine'}.toml)"
    )


def read_toml(path: Path) -> tuple[dict[str, Any], str]:
    """Read a TOML file; return its table and its text.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or is not TOML (line is named).
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text: {error}") from error
    try:
        return tomllib.loads(text), text
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from error


def check_keys(path: Path, table: Mapping[str, Any], known: Collection[str], at: str = "") -> None:
    """Raise ConfigError at the first key of ``table`` that is not in ``known``.

    Args:
        path: The file, for the message.
        table: The table as read.
        known: The keys that may be there.
        at: Where the table sits, with a trailing dot (``"measure."``); empty for the top.
    """
    for key in table:
        if key not in known:
            raise ConfigError(f"{path}:{at}{key}: unknown key; {_nearest(key, known)}")


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(repr(n) for n in near)
    return "expected one of " + ", ".join(sorted(known)) if known else "none is expected here"
