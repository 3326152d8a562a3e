"""What every runtime must offer: availability, build, open, run, time, profile.

A backend is chosen by name from ``registry``; its third-party library is imported only inside
its own module's methods. Engines are files; sessions are context managers around opened engines.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import ClassVar

import numpy as np
import numpy.typing as npt
from typing_extensions import Self

from prune2deploy.errors import ConfigError
from prune2deploy.target import PRECISIONS, Option, Target
from prune2deploy.timing import OperatorTiming

Array = npt.NDArray[np.generic]


@dataclass(frozen=True)
class Availability:
    """Whether a target can be used here; if not, why, and the line that fixes it."""

    usable: bool
    reason: str = ""
    fix: str = ""


@dataclass(frozen=True)
class Engine:
    """A built artefact.

    Attributes:
        path: The engine file (for ONNX Runtime, an ONNX file).
        onnx: The ONNX file that it was built from.
        backend: Name of the backend that built it.
        seconds: Build time.
        log: Path of the build log, or ``None``.
        precision: What it computes in, where that is not its target's precision.
    """

    path: Path
    onnx: Path
    backend: str
    seconds: float
    log: Path | None = None
    precision: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape (with -1 for a dynamic dimension) and numpy dtype name of an input or output."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Sample:
    """One timed run, in nanoseconds. ``cpu_ns`` is the calling thread's CPU time (0 if unknown)."""

    wall_ns: int
    cpu_ns: int
    device_ns: int = 0


class Session(ABC):
    """An opened engine, ready to run; close it by leaving its ``with`` block."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @abstractmethod
    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once and return every output by name."""

    @abstractmethod
    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Bind ``feeds`` so that ``time_once`` pays for inference only."""

    @abstractmethod
    def time_once(self) -> Sample:
        """Run once on what ``prepare`` bound and say how long it took."""

    @abstractmethod
    def close(self) -> None:
        """Free what the session holds."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Backend(ABC):
    """A runtime that builds and runs engines.

    Attributes:
        name: Key into the table of backends.
        options: Every key that a profile's ``[options]`` may have, with its default, whose type
            is the type expected; ``None`` leaves them unchecked.
        least: The least value of options that are numbers, where there is one.
        choices: All values of options that are names, where there are a few.
        precisions: Those that it runs.
        simulated: Its sessions compute their times instead of taking them; measuring then runs on
            a simulated clock, in this process.
        takes_program: It runs an exported program (``.pt2``) that lies beside the ONNX file.
    """

    name: str
    options: ClassVar[Mapping[str, Option] | None] = None
    least: ClassVar[Mapping[str, float]] = {}
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    precisions: ClassVar[tuple[str, ...]] = PRECISIONS
    simulated: ClassVar[bool] = False
    takes_program: ClassVar[bool] = False

    def check(self, target: Target) -> None:
        """Check the values of a profile whose options are of the right types.

        Raises:
            ConfigError: This backend takes no such value (file:key).
        """
        for name, least in self.least.items():
            value = dict(target.options).get(name, least)
            if not float(value) >= least:  # nan is not either
                raise ConfigError(
                    f"{target.path}:options.{name}: found {value!r}, expected {least:g} or more"
                )
        for name, choices in self.choices.items():
            chosen = dict(target.options).get(name, choices[0])
            if chosen not in choices:
                raise ConfigError(
                    f"{target.path}:options.{name}: found {chosen!r}, expected one of "
                    f"{', '.join(choices)}"
                )
        self.check_precision(target.precision, f"{target.path}:precision")

    def check_precision(self, precision: str, where: str) -> None:
        """Raise ConfigError, naming what gave the precision, where engines cannot have it."""
        if precision not in self.precisions:
            raise ConfigError(
                f"{where}: found {precision!r}, expected one of {', '.join(self.precisions)} "
                f"for backend {self.name!r}"
            )

    @abstractmethod
    def availability(self, target: Target) -> Availability:
        """Say whether ``target`` can be used on this machine; must not raise."""

    def can_build(self, target: Target) -> Availability:
        """Say whether engines for ``target`` can be built here, even if they cannot run here."""
        return self.availability(target)

    def int8_recipe(self, target: Target) -> str:
        """Name the form of int8 graph that runs best here: a key of ``quantize.RECIPES``."""
        return "tensorrt"

    def arithmetic(self, target: Target) -> str:
        """Name what engines of ``target`` compute in: a key of ``parity.TOLERANCE``."""
        return target.precision

    @abstractmethod
    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Build an engine from ``onnx`` into the folder ``out``; raises BuildError."""

    @abstractmethod
    def open(self, engine: Engine, target: Target) -> Session:
        """Open an engine for running."""

    @abstractmethod
    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Time every operator over ``runs`` runs; the minimum of each is kept.

        Empty where the runtime cannot tell operators apart.
        """

    @abstractmethod
    def versions(self) -> dict[str, str]:
        """Versions of the runtime and of what it sits on, for the manifest."""
