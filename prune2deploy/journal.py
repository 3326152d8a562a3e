"""The append-only log of a run: what has been finished, so that it is never done twice.

In: a file and frozen values. Out: the same values, from the file if a step was finished before.
One JSON document per line; a line counts once its newline is on disk. A process killed in the
middle of a line leaves a tail without newline, which the next one cuts off.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import time
import types
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from prune2deploy.errors import ConfigError

SCHEMA = 1  # 1: {"schema", "key", "time", "value"} per line

SESSION = "session/"

T = TypeVar("T")


class Journal:
    """Finished steps by key, in the order in which they were finished.

    Args:
        path: The JSONL file; made when it is not there.

    Raises:
        ConfigError: A line in the middle is damaged, or another version wrote it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._values: dict[str, Any] = {}
        self._times: list[tuple[str, float]] = []
        self._opened = time.time() - time.monotonic()
        if path.exists():
            _cut_tail(path)
            for number, line in enumerate(path.read_bytes().splitlines(), start=1):
                key, when, value = _parse(path, number, line)
                self._values[key] = value
                self._times.append((key, when))

    def __contains__(self, key: str) -> bool:
        return key in self._values

    @property
    def started(self) -> bool:
        """Whether any step is finished; that a session began does not count."""
        return any(not key.startswith(SESSION) for key in self._values)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the finished steps, oldest first."""
        return tuple(self._values)

    def read(self, key: str, kind: type[T]) -> T:
        """Return the value of a finished step as an instance of ``kind``."""
        try:
            return typing.cast("T", decode(kind, self._values[key]))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ConfigError(
                f"{self.path}: the record {key!r} does not hold a {kind.__name__} of this version "
                f"({error!r}); resume with the version that started the run, or start again"
            ) from error

    def write(self, key: str, value: object) -> None:
        """Append a finished step; it is on disk when this returns."""
        plain, now = encode(value), self._now()
        line = json.dumps({"schema": SCHEMA, "key": key, "time": now, "value": plain})
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._values[key] = plain
        self._times.append((key, now))

    def open_session(self) -> None:
        """Note that a process begins to work here."""
        number = sum(key.startswith(SESSION) for key in self._values)
        self.write(f"{SESSION}{number}", os.getpid())

    def seconds(self) -> float:
        """Time worked so far; what passed between a session's last record and the next is not."""
        spent = sum(
            now - before
            for (_, before), (key, now) in itertools.pairwise(self._times)
            if not key.startswith(SESSION)
        )
        return spent + (self._now() - self._times[-1][1] if self._times else 0.0)

    def _now(self) -> float:
        """Seconds since 1970 as it was on opening: a clock that is set later moves nothing."""
        return self._opened + time.monotonic()

    def once(self, key: str, kind: type[T], work: Callable[[], T]) -> T:
        """Return what ``work`` gave when ``key`` was finished, working only the first time."""
        if key not in self._values:
            self.write(key, work())
        return self.read(key, kind)

    def maybe(self, key: str, kind: type[T], work: Callable[[], T | None]) -> T | None:
        """The same for work that may give ``None``; that is kept too, and not asked for again."""
        if key not in self._values:
            self.write(key, work())
        return None if self._values[key] is None else self.read(key, kind)


def _cut_tail(path: Path) -> None:
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)


def _parse(path: Path, number: int, line: bytes) -> tuple[str, float, Any]:
    try:
        record = json.loads(line)
        schema, key, value = record["schema"], str(record["key"]), record["value"]
        when = float(record["time"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path}:{number}: found a damaged line ({error!r}), expected one JSON record; "
            "delete the run directory and start again"
        ) from error
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}:{number}: found journal schema {schema!r}, expected {SCHEMA}; "
            "resume with the version of prune2deploy that started the run"
        )
    return key, when, value


def encode(value: Any) -> Any:
    """Turn a frozen value into what JSON holds (dataclasses, mappings, tuples, paths, scalars)."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [f for f in dataclasses.fields(value) if f.init]
        return {f.name: encode(getattr(value, f.name)) for f in fields}
    if isinstance(value, Mapping):
        return {str(k): encode(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [encode(v) for v in value]
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise TypeError(f"a journal cannot hold {type(value).__name__}: {value!r}")


def decode(kind: Any, data: Any) -> Any:
    """Turn what :func:`encode` gave back into an instance of the annotated type ``kind``."""
    if typing.get_origin(kind) is not None:
        return _decode_generic(typing.get_origin(kind), typing.get_args(kind), data)
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        return typing.cast("Any", kind)(**{k: decode(hints[k], v) for k, v in data.items()})
    return kind(data) if kind in (float, int, str, bool, Path) else data


def _decode_generic(origin: Any, arguments: tuple[Any, ...], data: Any) -> Any:
    if origin in (typing.Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if data is None else decode(inner, data)
    if origin is tuple:
        kinds = arguments[:1] * len(data) if arguments[-1] is Ellipsis else arguments
        return tuple(decode(k, d) for k, d in zip(kinds, data, strict=True))
    if origin in (list, set, frozenset):
        return origin(decode(arguments[0], d) for d in data)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        return {_key(arguments[0], k): decode(arguments[1], v) for k, v in data.items()}
    return data


def _key(kind: Any, text: str) -> Any:
    return int(text) if kind is int else text
