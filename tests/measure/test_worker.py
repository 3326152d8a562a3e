"""How much the child takes upon itself."""

import pytest

from prune2deploy.measure.worker import affordable


@pytest.mark.parametrize(
    ("seconds", "runs"), [(0.0, 30), (0.01, 30), (3.0, 30), (10.0, 9), (60.0, 3), (1e6, 3)]
)
def test_slow_engines_are_profiled_over_fewer_runs(seconds, runs):
    assert affordable(30, seconds, 90.0) == runs
    assert affordable(2, seconds, 90.0) == 2
