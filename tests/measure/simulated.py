"""Simulated measurements under contention, to check the statistics against a known truth.

The host switches between quiet and contended stretches (a two-state Markov chain over pairs). A
contended stretch slows both runs of a pair by a common factor and adds independent noise to each,
and now and then a run is preempted for several times its own length, as wall clocks see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from prune2deploy.measure.stats import MIN_BLOCKS, Floats, interval, next_look, precise
from prune2deploy.target import MeasurePolicy


@dataclass(frozen=True)
class Host:
    """A simulated host; defaults are a busy shared machine.

    Attributes:
        noise: Standard deviation of the logarithm of one quiet run.
        contended: Probability that a quiet stretch turns contended, per pair.
        calm: Probability that a contended stretch ends, per pair.
        slowdown: Mean of the logarithm of the common slowdown while contended.
        extra: Standard deviation of the independent part while contended.
        preempted: Probability that one run is preempted.
    """

    noise: float = 0.01
    contended: float = 0.05
    calm: float = 0.1
    slowdown: float = 0.3
    extra: float = 0.06
    preempted: float = 0.02


def block_effects(shape: tuple[int, int, int], ratio: float, host: Host, seed: int) -> Floats:
    """Simulate measurements; return the effect of every block.

    Args:
        shape: Measurements, blocks of each, pairs of each block.
        ratio: The true ratio of candidate to reference.
        host: What disturbs them.
        seed: Of everything random.

    Returns:
        Logarithms of the ratio, (measurements, blocks).
    """
    runs, blocks, pairs = shape
    first, second = logarithms((runs, blocks * pairs), host, seed)
    effects = (np.log(ratio) + first - second).reshape(shape)
    return np.asarray(np.median(effects, axis=-1))


def logarithms(shape: tuple[int, int], host: Host, seed: int) -> tuple[Floats, Floats]:
    """Simulate two engines of one nanosecond side by side.

    Args:
        shape: Measurements, pairs of each.
        host: What disturbs them.
        seed: Of everything random.

    Returns:
        Logarithms of the wall time of either, (measurements, pairs).
    """
    random = np.random.default_rng(seed)
    contended = _stretches(random, shape, host)
    pressure = contended * random.exponential(host.slowdown, shape)
    spread = np.where(contended, host.extra, host.noise)

    def one() -> Floats:
        preempted = random.random(shape) < host.preempted
        delay = preempted * np.log1p(random.exponential(3.0, shape))
        return np.asarray(pressure + spread * random.standard_normal(shape) + delay)

    return one(), one()


def _stretches(
    random: np.random.Generator, shape: tuple[int, int], host: Host
) -> np.typing.NDArray[np.bool_]:
    state = random.random(shape[0]) < host.contended / (host.contended + host.calm)
    states = np.empty(shape, dtype=bool)
    for step in range(shape[1]):
        draw = random.random(shape[0])
        state = np.where(state, draw >= host.calm, draw < host.contended)
        states[:, step] = state
    return states


@dataclass(frozen=True)
class Outcome:
    """Stopped measurements, one entry each.

    Attributes:
        low: Lower 95 % bound of the ratio.
        high: Upper 95 % bound.
        blocks: Blocks taken.
    """

    low: Floats
    high: Floats
    blocks: Floats


def sequential(effects: Floats, policy: MeasurePolicy) -> Outcome:
    """Stop each simulated measurement (measurements, blocks) by the rule of real ones."""
    runs, most = effects.shape
    low, high, taken = (np.zeros(runs) for _ in range(3))
    going = np.arange(runs)
    blocks = MIN_BLOCKS
    while going.size:
        part = effects[going, :blocks]
        ends = precise(part, policy) | (blocks == most)
        done = going[ends]
        low[done], high[done] = (np.exp(bound) for bound in interval(part[ends]))
        taken[done] = blocks
        going = going[~ends]
        blocks = min(most, next_look(blocks))
    return Outcome(low, high, taken)
