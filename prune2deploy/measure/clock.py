"""The clock that sampling runs on: the machine's, or a simulated one that never waits."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod


class Clock(ABC):
    """Nanoseconds that only grow."""

    @abstractmethod
    def now(self) -> int:
        """Return the time in nanoseconds from an arbitrary start."""

    @abstractmethod
    def sleep(self, ns: int) -> None:
        """Let ``ns`` nanoseconds pass without running anything."""

    @abstractmethod
    def ran(self, ns: int) -> None:
        """Hear that a session was busy for ``ns`` nanoseconds."""


class RealClock(Clock):
    """The machine's monotonic clock."""

    def now(self) -> int:
        """Read the monotonic clock."""
        return time.perf_counter_ns()

    def sleep(self, ns: int) -> None:
        """Sleep."""
        time.sleep(ns / 1e9)

    def ran(self, ns: int) -> None:
        """Nothing to do: time passed by itself."""


class SimulatedClock(Clock):
    """Time passes only by what sessions say they took."""

    def __init__(self) -> None:
        self._now = 0

    def now(self) -> int:
        """Return the simulated time."""
        return self._now

    def sleep(self, ns: int) -> None:
        """Pass at once."""
        self._now += ns

    def ran(self, ns: int) -> None:
        """Let the time of a run pass."""
        self._now += ns
