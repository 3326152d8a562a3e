"""Statistics of interleaved samples; pure functions of arrays, no clocks and no files.

A *pair* is one run of the candidate beside one run of the reference; its effect is the logarithm
of their ratio. Pairs of one *block* share what the host did meanwhile, so blocks are resampled,
never single pairs. Every block counts by the median of its pairs, and blocks by their trimmed
mean: one preemption spoils neither. Everything works along the last axis, so that many simulated
measurements are evaluated at once.

Sources: block resampling, Künsch 1989 (Annals of Statistics 17:1217); trimmed means and their
degrees of freedom, Tukey and McLaughlin 1963 (Sankhya A 25:331); order-statistic bounds of
quantiles, David and Nagaraja, Order Statistics, section 7.1; batch means for runs that come in
clumps, Conway 1963 (Management Science 10:47); what correlated values are worth, Bartlett 1946
(Supplement to the Journal of the Royal Statistical Society 8:27); fences, Tukey 1977.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import binom, norm, spearmanr, t

from prune2deploy.target import MeasurePolicy

Floats = npt.NDArray[np.float64]

TRIM = 0.2
"""Fraction of blocks left out at either end of the trimmed mean."""
RESAMPLES = 300
MIN_BLOCKS = 10
LOOK_GROWTH = 1.3
"""Stopping is considered only each time the blocks have grown by this: few looks, few errors."""
EARLY_LEVEL = 0.998
"""Level of the interval that an early decision must clear, because it is looked at repeatedly."""
DRIFTED = 0.03
"""Change of the reference within a measurement that is worth telling."""
BATCHES = 20
"""Stretches of time that the spread of a quantile is taken from: contention comes in clumps."""
MOST_ALIKE = 0.8
"""Greatest correlation of neighbouring stretches that is believed: few tell it only roughly."""


def block_medians(values: Floats, blocks: npt.NDArray[np.int64]) -> Floats:
    """Return the median of ``values`` (n,) for each block number in ``blocks`` (n,), in order."""
    edges = np.flatnonzero(np.diff(blocks)) + 1
    return np.array([np.median(part) for part in np.split(values, edges) if part.size])


def trimmed_mean(values: Floats) -> Floats:
    """Mean along the last axis without the lowest and highest fifth."""
    cut = int(TRIM * values.shape[-1])
    inner = np.sort(values, axis=-1)[..., cut : values.shape[-1] - cut]
    return np.asarray(inner.mean(axis=-1))


def interval(effects: Floats) -> tuple[Floats, Floats]:
    """Return the 95 % interval of the trimmed mean of ``effects`` (..., blocks).

    Percentile bootstrap over blocks, widened about the estimate by what few blocks cost: Student's
    t over the normal quantile, and the bias of the bootstrap's variance. In simulation this covers
    the truth in 94 to 97 % of measurements from 10 blocks on; the plain percentiles in 91 %.

    Args:
        effects: One value per block.

    Returns:
        Lower and upper bound per leading index; infinite with fewer than two blocks.
    """
    blocks = effects.shape[-1]
    if blocks < 2:
        wide = np.full(effects.shape[:-1], np.inf)
        return -wide, wide
    picks = np.random.default_rng(0).integers(0, blocks, (RESAMPLES, blocks))
    means = np.stack([trimmed_mean(effects[..., pick]) for pick in picks])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    centre = trimmed_mean(effects)
    widen = t.ppf(0.975, blocks - 1) / norm.ppf(0.975) * np.sqrt(blocks / (blocks - 1))
    return centre - widen * (centre - low), centre + widen * (high - centre)


def next_look(blocks: int) -> int:
    """At how many blocks stopping is considered next, after a look at ``blocks``."""
    return int(np.ceil(blocks * LOOK_GROWTH))


def precise(effects: Floats, policy: MeasurePolicy) -> npt.NDArray[np.bool_]:
    """Whether the interval of block effects (..., blocks) is as narrow as the policy wants."""
    low, high = interval(effects)
    return np.asarray((high - low) / 2 <= np.log1p(policy.half_width))


def ratio_interval(effects: Floats) -> tuple[float, tuple[float, float]]:
    """Return the ratio and its 95 % interval from block effects (blocks,)."""
    low, high = interval(effects)
    return float(np.exp(trimmed_mean(effects))), (float(np.exp(low)), float(np.exp(high)))


def share_error(values: Floats, quantile: float) -> tuple[float, float]:
    """Standard error of the share of ``values`` (n,), in order of time, that a quantile exceeds.

    That of independent values, or of the shares in ``BATCHES`` stretches of time if greater: a busy
    host slows many runs in a row, and a clump of them tells little more than one. Where stretches
    resemble their neighbours, clumps are longer than they, and their error grows accordingly.

    Returns:
        The error, and its degrees of freedom.
    """
    below = values <= np.quantile(values, quantile)
    shares = np.array([part.mean() for part in np.array_split(below, min(BATCHES, len(values)))])
    off, count = shares - shares.mean(), len(shares)
    squares = float((off**2).sum())
    alike = float((off[1:] * off[:-1]).sum()) / squares + 1 / count if squares else 0.0
    alike = min(max(alike, 0.0), MOST_ALIKE)
    stretch = (1 + alike) / (1 - alike)  # how many neighbours tell as much as one, if chained
    clumped = float(np.sqrt(stretch * squares / max(1, count - 1) / count))
    independent = float(np.sqrt(quantile * (1 - quantile) / len(values)))
    return max(independent, clumped), max(1.0, (count - 1) / stretch)


def median_interval(values: Floats, level: float = 0.95) -> tuple[float, float]:
    """Return the interval of the median of ``values`` (n,), which are in order of time.

    In simulation, 95 % intervals cover 93 to 98 % where a stretch of contention lasts up to a
    fiftieth of the measurement, and 85 % where it lasts a tenth. A host that changes its speed for
    longer than that shows only what it was like meanwhile.
    """
    if len(values) < 2:
        return 0.0, float("inf")
    error, freedom = share_error(values, 0.5)
    half = float(t.ppf(0.5 + level / 2, freedom)) * error
    if half < 0.5:
        low, high = np.quantile(values, [0.5 - half, 0.5 + half])
        return float(low), float(high)
    spread = float(t.ppf(0.5 + level / 2, len(values) - 1) * np.log(values).std(ddof=1))
    spread *= float(np.sqrt(np.pi / 2 / len(values)))  # the median's error over the mean's
    low, centre, high = np.quantile(values, [0.0, 0.5, 1.0])  # at least all that was seen
    wide = centre * np.exp([-spread, min(spread, 50.0)])
    return float(min(low, wide[0])), float(max(high, wide[1]))


def upper_quantile(values: Floats, quantile: float) -> tuple[float, bool]:
    """Bound a quantile of ``values`` (n,), which are in order of time, by an order statistic.

    The true quantile is below the bound with 95 % confidence.
    The k-th smallest of n independent values lies above the quantile with probability
    P(Bin(n, q) < k). Values that come in clumps count as the fewer independent ones that have the
    same error (see ``share_error``).

    Returns:
        The bound, and whether there were samples enough for it; if not, it is the largest sample.
    """
    ordered, count = np.sort(values), len(values)
    worth = quantile * (1 - quantile) / share_error(values, quantile)[0] ** 2
    worth = max(1, min(count, round(worth)))
    rank = int(binom.ppf(0.95, worth, quantile))  # 0-based rank of the bound among ``worth``
    if rank >= worth:
        return float(ordered[-1]), False
    return float(ordered[min(count - 1, int(np.ceil(rank * count / worth)))]), True


def outliers(values: Floats) -> dict[str, int]:
    """Count samples beyond Tukey's fences; none is dropped.

    Returns:
        Counts of ``low_severe``, ``low_mild``, ``high_mild`` and ``high_severe``: beyond 1.5 and 3
        times the distance of the quartiles.
    """
    first, third = np.quantile(values, [0.25, 0.75])
    spread = third - first
    low, high = first - 1.5 * spread, third + 1.5 * spread
    far_low, far_high = first - 3 * spread, third + 3 * spread
    return {
        "low_severe": int((values < far_low).sum()),
        "low_mild": int(((values < low) & (values >= far_low)).sum()),
        "high_mild": int(((values > high) & (values <= far_high)).sum()),
        "high_severe": int((values > far_high).sum()),
    }


@dataclass(frozen=True)
class Drift:
    """Change of the reference from the first to the last third of its blocks.

    Attributes:
        change: Relative; 0.03 is three per cent slower at the end.
        steady: Whether it grew steadily (rank correlation with time above 0.5), as heat does,
            rather than in jumps, as other programs do.
    """

    change: float
    steady: bool

    @property
    def throttled(self) -> bool:
        """Whether the device got slower as heat makes it."""
        return self.change > DRIFTED and self.steady


def drift(medians: Floats) -> Drift:
    """Judge the drift of block medians (blocks,) of the reference, in order of time."""
    third = len(medians) // 3
    if third < 2 or np.ptp(medians) == 0:
        return Drift(0.0, False)
    change = float(np.median(medians[-third:]) / np.median(medians[:third]) - 1)
    trend = float(spearmanr(np.arange(len(medians)), medians).statistic)
    return Drift(change, trend > 0.5)


def settled(medians: Sequence[float]) -> bool:
    """Whether the last two of some block medians agree within 2 %."""
    return len(medians) >= 2 and abs(medians[-1] / medians[-2] - 1) <= 0.02
