import numpy as np
import pytest

from prune2deploy.measure import stats
from prune2deploy.measure.deadline import verdict
from prune2deploy.target import MeasurePolicy

from .simulated import Host, logarithms


def test_block_medians_follow_the_block_numbers():
    values = np.array([3.0, 1.0, 2.0, 10.0, 20.0, 5.0])
    blocks = np.array([0, 0, 0, 1, 1, 4])
    assert stats.block_medians(values, blocks).tolist() == [2.0, 15.0, 5.0]


def test_the_trimmed_mean_drops_a_fifth_at_either_end():
    values = np.array([100.0, 1.0, 2.0, 3.0, -50.0])
    assert stats.trimmed_mean(values) == 2.0
    assert stats.trimmed_mean(np.array([[1.0, 3.0], [5.0, 7.0]])).tolist() == [2.0, 6.0]


def test_one_spoilt_block_barely_moves_the_interval():
    effects = np.random.default_rng(0).normal(0, 0.01, 20)
    calm = stats.interval(effects)
    spoilt = effects.copy()
    spoilt[7] = 3.0
    wild = stats.interval(spoilt)
    assert abs(wild[0] - calm[0]) < 0.005
    assert abs(wild[1] - calm[1]) < 0.01


def test_an_interval_holds_its_estimate_and_shrinks_with_blocks():
    effects = np.random.default_rng(1).normal(-0.5, 0.05, 400)
    widths = []
    for count in (10, 40, 400):
        low, high = stats.interval(effects[:count])
        assert low < stats.trimmed_mean(effects[:count]) < high
        widths.append(high - low)
    assert widths[0] > 1.5 * widths[1] > 1.5 * 1.5 * widths[2]


def test_one_block_tells_nothing():
    low, high = stats.interval(np.array([0.1]))
    assert low == -np.inf and high == np.inf


def test_many_measurements_at_once_agree_with_one_by_one():
    effects = np.random.default_rng(2).normal(0, 1, (5, 12))
    low, high = stats.interval(effects)
    for row in range(5):
        assert stats.interval(effects[row]) == pytest.approx((low[row], high[row]))


def test_a_known_ratio_is_found():
    effects = np.log(0.5) + np.random.default_rng(3).normal(0, 0.01, 30)
    ratio, (low, high) = stats.ratio_interval(effects)
    assert low < 0.5 < high
    assert ratio == pytest.approx(0.5, rel=0.01)


def test_precise_means_as_narrow_as_the_policy_wants():
    policy = MeasurePolicy(half_width=0.01)
    random = np.random.default_rng(4)
    assert stats.precise(random.normal(np.log(0.5), 0.001, 12), policy)
    assert not stats.precise(random.normal(np.log(0.5), 0.2, 12), policy)


def spread(count):
    """1 to ``count``, every stretch of it alike."""
    values = np.arange(1.0, count + 1)
    return values[np.argsort(np.arange(count) * 0.6180339887 % 1)]


def test_the_upper_quantile_bound_by_hand():
    # 59 samples: 0.95 ** 59 < 0.05, so the largest bounds p95; with 58 nothing does.
    assert stats.upper_quantile(spread(59), 0.95) == (59.0, True)
    assert stats.upper_quantile(spread(58), 0.95) == (58.0, False)
    # 93 samples: P(Bin(93, 0.95) <= 91) >= 0.95 > P(... <= 90), so the second largest will do.
    assert stats.upper_quantile(spread(93), 0.95) == (92.0, True)
    assert not stats.upper_quantile(spread(298), 0.99)[1]
    assert stats.upper_quantile(spread(299), 0.99) == (299.0, True)


def test_slow_runs_in_one_clump_count_as_few():
    values = np.ones(400)
    values[np.arange(20) * 20] = 2.0
    apart, enough = stats.upper_quantile(values + 1e-6 * spread(400), 0.94)
    assert enough and apart > 2
    assert stats.share_error(values, 0.94)[0] == pytest.approx(np.sqrt(0.94 * 0.06 / 400))
    clump = np.sort(values)
    assert stats.share_error(clump, 0.94)[0] > 2 * stats.share_error(values, 0.94)[0]


def test_the_upper_quantile_bound_covers():
    random = np.random.default_rng(5)
    truth = -np.log(0.05)  # p95 of the exponential distribution
    bounds = [stats.upper_quantile(random.exponential(size=200), 0.95)[0] for _ in range(2000)]
    assert np.mean(np.array(bounds) >= truth) >= 0.94


@pytest.mark.parametrize(
    ("host", "least"),
    [
        (Host(), 0.93),
        (Host(contended=0.01), 0.94),
        (Host(contended=1e-9), 0.95),
        (Host(contended=0.02, calm=0.04), 0.89),  # stretches of 25 pairs in 500
        (Host(contended=0.01, calm=0.02), 0.83),  # of 50
    ],
)
def test_the_median_of_a_contended_host_is_covered(host, least):
    truth = np.exp(np.median(logarithms((100, 5000), host, seed=1)[0]))
    runs = np.exp(logarithms((600, 500), host, 2)[0])
    bounds = np.array([stats.median_interval(one) for one in runs])
    covered = (bounds[:, 0] <= truth) & (truth <= bounds[:, 1])
    assert least <= covered.mean() <= 0.985


@pytest.mark.parametrize("quantile", [0.95, 0.99])
def test_the_upper_quantile_of_a_contended_host_is_bounded(quantile):
    host = Host(contended=0.01)
    truth = np.quantile(logarithms((100, 5000), host, seed=3)[0], quantile)
    found = [stats.upper_quantile(one, quantile) for one in logarithms((600, 500), host, 4)[0]]
    bounds = np.array([bound for bound, enough in found if enough])
    assert len(bounds) > 450
    assert (bounds >= truth).mean() >= 0.92  # counting every run as independent: 0.81 at p95


def test_outliers_are_counted_by_fence():
    values = np.array([*np.linspace(10, 20, 101), 31, 41, -1, -11.0])
    counts = stats.outliers(values)
    assert counts == {"low_severe": 1, "low_mild": 1, "high_mild": 1, "high_severe": 1}


def test_drift_tells_heat_from_jumps():
    heat = np.linspace(100, 110, 30)
    found = stats.drift(heat)
    assert found.change == pytest.approx(0.067, abs=0.01)
    assert found.steady
    jumps = np.array([100, 120, 90] * 10, dtype=float)
    assert not stats.drift(jumps).steady
    assert stats.drift(np.full(30, 7.0)) == stats.Drift(0.0, False)


def test_settled_needs_two_blocks_that_agree():
    assert not stats.settled([1.0])
    assert not stats.settled([1.4, 1.0])
    assert stats.settled([1.4, 1.0, 1.01])


@pytest.mark.parametrize(
    ("interval", "expected"),
    [((8, 10), "met"), ((8, 10.1), "uncertain"), ((10.1, 12), "missed"), ((10, 12), "uncertain")],
)
def test_verdicts(interval, expected):
    assert verdict(interval, 10) == expected


@pytest.mark.parametrize("count", [2, 4, 8, 12])
def test_the_median_of_few_values_has_a_finite_interval_that_covers(count):
    values = np.exp(np.random.default_rng(0).normal(1, 0.1, (2000, count)))
    bounds = np.array([stats.median_interval(one) for one in values])
    assert np.isfinite(bounds).all() and (bounds > 0).all()
    covered = (bounds[:, 0] <= np.e) & (np.e <= bounds[:, 1])
    assert covered.mean() >= 0.93
