"""What the verdict says in words."""

from types import SimpleNamespace

import pytest

from prune2deploy.config import Budget
from prune2deploy.measure import Comparison, LatencyStats
from prune2deploy.search.job import judge
from prune2deploy.summary import verdict_text

BUDGET = Budget(latency_ms=9.9, percentile=99)


def told(flags, unbounded):
    candidate = LatencyStats(9.8, 10.8, 11.8, (9.7, 9.9), 50_000, unbounded)
    reference = LatencyStats(20, 22, 24, (20, 20), 50_000)
    seen = Comparison(candidate, reference, 0.49, (0.485, 0.495), "cpu", 9.8, None, None,
                      "precise", flags, {}, {})  # fmt: skip
    verdict = judge(seen, BUDGET)[-1]
    assert verdict == "uncertain"
    return verdict_text(
        SimpleNamespace(
            verdict=verdict,
            final=SimpleNamespace(budget=BUDGET, comparison=seen, budget_ms=9.9),
            target=SimpleNamespace(measure=SimpleNamespace(max_seconds=90.0)),
            floor_ms=None,
        )
    )


@pytest.mark.parametrize("flags", [(), ("noisy host",)])
def test_too_few_samples_for_a_percentile_are_said_to_be_that(flags):
    assert "50000 samples within the time limit of 90 s are too few" in told(flags, (99,))


def test_a_tail_that_a_disturbed_host_may_have_made_is_said_to_be_that():
    text = told(("noisy host", "wide interval", "drift"), ())
    assert "disturbed (noisy host, drift)" in text and "p99" in text
    assert "too few" not in text and "max_seconds" not in text
