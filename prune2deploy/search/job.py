"""What the loop works on and ends with, and the decisions that are plain arithmetic.

In: plain values. Out: :class:`Job`, :class:`Baseline`, :class:`Attempt`, :class:`Outcome`;
:func:`judge`, :func:`best` and :func:`aim`. No files and no clocks here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prune2deploy import measure
from prune2deploy.config import Budget
from prune2deploy.graph import Graph
from prune2deploy.measure import Comparison, Measurement
from prune2deploy.plan.allocate import Gap
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.progress import Progress, silent
from prune2deploy.rundir import RunDir
from prune2deploy.search.accuracy import Accuracy
from prune2deploy.search.candidate import Built
from prune2deploy.search.payoff import Payoff
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming

MARGIN = 0.005  # aimed below the budget, beside the half-width of the interval
WIDEST = 0.03  # half-width up to which a wide interval lowers the aim
Finetune = Callable[[nn.Module], nn.Module | None]


@dataclass(frozen=True, eq=False)
class Job:
    """What a run or a sweep works on.

    Attributes:
        module: The model; it is not changed.
        example_inputs: What ``module(*example_inputs)`` takes.
        target: Where the result runs.
        run: The opened run directory.
        batches: Calibration data, or ``None``.
        finetune: Called with the pruned module; trains it in place or returns another.
        input_names: Names of the inputs in the ONNX file; empty leaves them to the exporter.
        output_names: Names of the outputs in the ONNX file; empty likewise.
        progress: Hears of every step.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    target: Target
    run: RunDir
    batches: Any = None
    finetune: Finetune | None = None
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    progress: Progress = silent


@dataclass(frozen=True)
class Baseline:
    """The unpruned model, built, profiled and measured."""

    built: Built
    profile: tuple[OperatorTiming, ...]
    measured: Measurement

    @property
    def p50_ms(self) -> float:
        """Its measured median."""
        return self.measured.latency.p50_ms


@dataclass(frozen=True)
class Attempt:
    """One candidate that was measured beside the baseline.

    Attributes:
        built: The build.
        profile: Time of each operator.
        comparison: What was measured.
        predicted_ms: What the model had predicted, in baseline milliseconds.
        budget_ms: The budget in this session: for a speed-up, the baseline's median over it.
        value_ms: The percentile that the budget is for.
        verdict: ``met``, ``missed`` or ``uncertain``.
    """

    built: Built
    profile: tuple[OperatorTiming, ...]
    comparison: Comparison
    predicted_ms: float
    budget_ms: float
    value_ms: float
    verdict: str

    @property
    def share(self) -> float:
        """Measured latency as a fraction of the budget."""
        return self.value_ms / self.budget_ms


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run ended with.

    Attributes:
        verdict: ``met``, ``unreachable``, ``missed`` or ``uncertain``.
        module: The pruned module.
        final: Its build and measurement.
        baseline: What it is compared with.
        attempts: Every measured candidate in order, the final one last.
        probes: Builds that were profiled only.
        model: The latency model at the end; ``None`` where no plan was needed.
        graph: Axes and layers of the model.
        multiple: The channel multiple that was used.
        target: The target with the precision of the run.
        floor_ms: Measured latency of the smallest plan, where the budget was out of reach.
        notes: What a reader of the report should know.
        curve: ``((predicted milliseconds, retained worth 0..1), ...)``, in baseline milliseconds.
        multiple_source: Where the channel multiple is from.
        gap: What other widths of the same predicted latency could keep at most beyond the plan.
        whole: The latency model of all blocks, where some were taken out.
        accuracy: Top-1 before and after; ``None`` where the data has no class labels.
        paid: The precision against fp32 on the unpruned model; ``None`` for fp32.
    """

    verdict: str
    module: nn.Module
    final: Attempt
    baseline: Baseline
    attempts: tuple[Attempt, ...]
    probes: tuple[Built, ...]
    model: LatencyModel | None
    graph: Graph
    multiple: int
    target: Target
    floor_ms: float | None = None
    notes: tuple[str, ...] = ()
    paid: Payoff | None = None
    curve: tuple[tuple[float, float], ...] = ()
    whole: LatencyModel | None = None
    multiple_source: str = "detected on this machine"
    gap: Gap | None = None
    accuracy: Accuracy | None = None


def judge(comparison: Comparison, budget: Budget) -> tuple[float, float, str]:
    """Compare a measurement with the budget.

    Returns:
        Budget in this session, the latency it is for, and the verdict. A percentile above the
        median is an upper confidence bound already, so it is met or missed.
    """
    measured = comparison.candidate
    limit = budget.latency_ms
    if limit is None:
        assert budget.speedup is not None
        limit = comparison.reference.p50_ms / budget.speedup
    if budget.percentile == 50:
        return limit, measured.p50_ms, measure.verdict(measured.ci95_ms, limit)
    value = measured.p95_ms if budget.percentile == 95 else measured.p99_ms
    return limit, value, "met" if value <= limit else "missed"


def best(attempts: Sequence[Attempt]) -> Attempt:
    """The slowest that meets the budget, since it kept most; else the fastest there is."""
    met = [a for a in attempts if a.verdict == "met"]
    if met:
        return max(met, key=lambda a: a.share)
    return min(attempts, key=lambda a: a.share)


def aim(limit_ms: float, half_width: float) -> float:
    """Where to aim so that the upper end of an interval of ``half_width`` meets the limit."""
    return limit_ms * (1 - min(half_width, WIDEST) - MARGIN)
