import numpy as np
import pytest

from prune2deploy.measure.stats import interval
from prune2deploy.target import MeasurePolicy

from .simulated import Host, block_effects, sequential

RUNS = 2000
HOSTS = {
    "busy": Host(),
    "quiet": Host(noise=0.003, contended=0.01),
    "thrashing": Host(preempted=0.1, extra=0.12),
}


@pytest.mark.parametrize("pairs", [4, 20])
@pytest.mark.parametrize("name", HOSTS)
def test_a_a_control_is_rarely_called_faster_and_intervals_cover(name, pairs):
    effects = block_effects((RUNS, 60, pairs), 1.0, HOSTS[name], seed=1)
    found = sequential(effects, MeasurePolicy(half_width=0.01))
    assert (found.high <= 1).mean() <= 0.05
    assert (found.low > 1).mean() <= 0.05
    covered = ((found.low <= 1) & (found.high >= 1)).mean()
    # 93 to 97 %, and three standard errors of a share of 2,000
    assert 0.93 <= covered <= 0.97 + 0.012


def test_a_true_ratio_is_covered_when_only_precision_is_asked_for():
    effects = block_effects((RUNS, 60, 6), 0.7, HOSTS["busy"], seed=2)
    found = sequential(effects, MeasurePolicy(half_width=0.01))
    assert 0.93 <= ((found.low <= 0.7) & (found.high >= 0.7)).mean() <= 0.975
    finished = found.blocks < 60
    half = (np.log(found.high / found.low) / 2)[finished]
    assert (half <= np.log(1.01) + 1e-9).all()


def test_samples_taken_as_independent_would_not_cover():
    # The reason for resampling blocks: opening an engine shifts a whole block.
    random = np.random.default_rng(0)
    shifts = random.normal(0, 0.01, (500, 20, 1))
    pairs = shifts + random.normal(0, 0.003, (500, 20, 10))
    flat = pairs.reshape(500, -1)
    naive = 1.96 * flat.std(axis=1) / np.sqrt(flat.shape[1])
    assert (np.abs(flat.mean(axis=1)) <= naive).mean() < 0.7
    low, high = interval(np.median(pairs, axis=-1))
    assert 0.92 <= ((low <= 0) & (high >= 0)).mean() <= 0.98
