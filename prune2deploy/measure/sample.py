"""Take interleaved samples of engines until the statistics allow to stop.

In: the engines of one comparison, their target and its measuring policy. Out: raw ``Samples``.

Rounds run every session once in a random order and once in the reverse one; rounds make blocks of
at least ``BLOCK_NS``. Sessions are opened afresh for every block, because the places of an engine's
buffers in memory change its latency by about one per cent until it is closed (measured with six
copies of one network in one process). A ratio from a single opening would be wrong by that much,
however narrow its interval. Where opening is too slow for this, sessions stay open.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from statistics import median

import numpy as np

from prune2deploy.backends.base import Backend, Engine, Sample, Session
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.measure import host, stats
from prune2deploy.measure.clock import Clock, RealClock, SimulatedClock
from prune2deploy.measure.deadline import Goal
from prune2deploy.measure.samples import NOISE, Samples
from prune2deploy.measure.summary import choose_clock, effects, judgeable, times
from prune2deploy.target import MeasurePolicy, Target

Opener = Callable[[], Session]
"""Opens and prepares a session."""

BLOCK_NS = 100_000_000
LEAST_BLOCKS = 2  # whatever the time limit says: one block has no spread
WARM_BLOCKS = 12
WARM_RUNS = 3  # after each opening: the first runs of a session are slower
COOL_NS = 5_000_000_000
REOPENINGS = 24  # sessions stay open when opening takes more than this part of the time cap
_FLOOR_NS = 1_000  # a run is never taken for shorter when blocks are sized
_SIMULATED_ROUNDS = 2


def silent() -> None:
    """No heartbeat."""


def interleaved(
    backend: Backend,
    engines: tuple[Engine, Engine],
    target: Target,
    *,
    goal: Goal | None,
    heartbeat: Callable[[], None] = silent,
) -> Samples:
    """Open candidate and reference (twice, if the policy wants a control) and sample them."""

    def opener(engine: Engine) -> Session:
        own = replace(target, precision=engine.precision or target.precision)
        with ExitStack() as unfinished:
            session = unfinished.enter_context(backend.open(engine, own))
            session.prepare(random_feeds(session.inputs, seed=0, onnx=engine.onnx))
            unfinished.pop_all()
        return session

    chosen = [*engines, engines[1]] if target.measure.control else list(engines)
    clock = SimulatedClock() if backend.simulated else RealClock()
    openers = [partial(opener, engine) for engine in chosen]
    sampler = Sampler(openers, target, clock, simulated=backend.simulated, heartbeat=heartbeat)
    taken = sampler.collect(goal)
    facts = {} if backend.simulated else host.fingerprint()
    facts.update(versions=backend.versions(), threads=target.threads, target=target.sha256)
    return replace(taken, notes={**taken.notes, "fingerprint": facts})


class Sampler:
    """Takes samples of the engines behind some openers: candidate, reference, perhaps its twin.

    Args:
        openers: One per engine.
        target: Its measuring policy says how precisely and how long.
        clock: What time is read from.
        simulated: Whether runs take no real time.
        heartbeat: Called again and again while work goes on.
    """

    def __init__(
        self,
        openers: Sequence[Opener],
        target: Target,
        clock: Clock,
        *,
        simulated: bool,
        heartbeat: Callable[[], None] = silent,
    ) -> None:
        self._heartbeat = heartbeat
        self._openers = openers
        self._target = target
        self._clock = clock
        self._simulated = simulated
        self._random = np.random.default_rng(0)
        self._sessions: list[Session] = []
        self._open = ExitStack()
        self._reopen = False
        self._rounds = 1
        self._rows: list[list[tuple[int, int, int]]] = []
        self._blocks: list[int] = []
        self._noise: list[tuple[int, ...]] = []

    def collect(self, goal: Goal | None) -> Samples:
        """Warm up, sample until the policy is content, and once more if the device throttled.

        Args:
            goal: What must be judged beyond the ratio; ``None`` for the ratio alone.
        """
        with self._open:
            samples = self._attempt(goal)
            if not self._simulated and self._throttled(samples):
                self._heartbeat()
                self._clock.sleep(COOL_NS)
                samples = self._attempt(goal)
                samples = replace(samples, notes={**samples.notes, "cooled": True})
        return samples

    def _attempt(self, goal: Goal | None) -> Samples:
        self._rows = [[] for _ in self._openers]
        self._blocks, self._noise = [], []
        warm = self._warm_up()
        stopped = self._sample(goal)
        return self._samples({"warm": warm, "stopped": stopped, "reopened": self._reopen})

    def _renew(self) -> None:
        """Close what is open, open every engine again and run each a few times."""
        self._open.close()
        self._sessions = [self._open.enter_context(opener()) for opener in self._openers]
        for session in self._sessions:
            for _ in range(WARM_RUNS):
                self._time(session)

    def _time(self, session: Session) -> Sample:
        sample = session.time_once()
        self._clock.ran(sample.wall_ns)
        return sample

    def _warm_up(self) -> bool:
        """Run until consecutive medians of every engine agree within 2 %; size the blocks."""
        policy = self._target.measure
        started = self._clock.now()
        opening = self._opening_ns()
        limit = started + int(0.25 * policy.max_seconds * 1e9)
        medians: list[list[float]] = [[] for _ in self._sessions]
        settled = False
        for _ in range(WARM_BLOCKS):
            for kept, taken in zip(medians, self._warm_block(), strict=True):
                kept.append(max(float(median(taken)), _FLOOR_NS))
            self._heartbeat()
            settled = all(stats.settled(values) for values in medians)
            if settled or self._clock.now() > limit:
                break
        self._reopen = not self._simulated and opening < self._affordable_ns
        length = max(BLOCK_NS, opening) if self._reopen else BLOCK_NS
        self._rounds = max(1, round(length / (2 * sum(kept[-1] for kept in medians))))
        if self._simulated:
            self._rounds = _SIMULATED_ROUNDS
        return settled

    @property
    def _affordable_ns(self) -> float:
        return self._target.measure.max_seconds * 1e9 / REOPENINGS

    def _opening_ns(self) -> int:
        """Open every engine; how long that takes, once the libraries have been loaded."""
        for _ in range(2):
            started = self._clock.now()
            self._renew()
            self._heartbeat()
            opening = self._clock.now() - started
            if not self._affordable_ns <= opening < REOPENINGS / 4 * self._affordable_ns:
                break  # the first opening is cheap, or the second would cost too much
        return opening

    def _warm_block(self) -> list[list[int]]:
        ends = self._clock.now() + BLOCK_NS // 2
        found: list[list[int]] = [[] for _ in self._sessions]
        while not found[0] or self._clock.now() < ends:
            for kept, session in zip(found, self._sessions, strict=True):
                sample = self._time(session)
                kept.append(sample.device_ns or sample.cpu_ns or sample.wall_ns)
            if self._simulated:
                break
        return found

    def _sample(self, goal: Goal | None) -> str:
        """Take blocks until a look says stop; return why."""
        policy = self._target.measure
        started = self._clock.now()
        look = max(stats.MIN_BLOCKS, -(-policy.min_samples // (2 * self._rounds)))
        count = 0
        while True:
            self._block(count)
            count += 1
            seconds = (self._clock.now() - started) / 1e9
            self._heartbeat()
            if count >= look:
                look = stats.next_look(count)
                if self._suffices(policy, goal, seconds):
                    return "precise"
            if seconds >= policy.max_seconds and count >= LEAST_BLOCKS:
                return "time"

    def _suffices(self, policy: MeasurePolicy, goal: Goal | None, seconds: float) -> bool:
        if seconds < policy.min_seconds and not self._simulated:
            return False
        samples = self._samples({})
        clock = choose_clock(samples, self._target)
        if not stats.precise(effects(samples, clock), policy):
            return False
        return goal is None or judgeable(samples, clock, goal, policy.half_width)

    def _block(self, number: int) -> None:
        """Time one block of rounds and note what the host did meanwhile."""
        if self._reopen:
            self._renew()
        before, started = host.counters(), self._clock.now()
        gc.disable()
        for _ in range(self._rounds):
            order = self._random.permutation(len(self._sessions))
            for turn in (order, order[::-1]):
                for index in turn:
                    sample = self._time(self._sessions[index])
                    self._rows[index].append((sample.wall_ns, sample.cpu_ns, sample.device_ns))
                self._blocks.append(number)
        gc.enable()
        wall = self._clock.now() - started
        after = host.counters()
        self._noise.append((wall, *(b - a for a, b in zip(before, after, strict=True))))

    def _throttled(self, samples: Samples) -> bool:
        clock = choose_clock(samples, self._target)
        values = times(samples.reference, clock)
        return stats.drift(stats.block_medians(values, samples.block)).throttled

    def _samples(self, notes: dict[str, bool | str]) -> Samples:
        rows = [np.array(values, dtype=np.int64).reshape(-1, 3) for values in self._rows]
        return Samples(
            candidate=rows[0],
            reference=rows[1],
            twin=rows[2] if len(rows) > 2 else np.empty((0, 3), dtype=np.int64),
            block=np.array(self._blocks, dtype=np.int64),
            noise=np.array(self._noise, dtype=np.int64).reshape(-1, len(NOISE)),
            notes=dict(notes),
        )
