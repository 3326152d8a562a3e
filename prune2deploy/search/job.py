"""What a run works on and ends with, and its decisions that are plain arithmetic.

In: plain values. Out: :class:`Job`, :class:`Baseline`, :class:`Attempt`, :class:`Outcome`;
:func:`judge`, :func:`best` and :func:`aim`. Nothing here reads files or clocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from prune2deploy import measure
from prune2deploy.calibration import serves
from prune2deploy.config import FILL, Budget, RunOptions
from prune2deploy.graph import Graph
from prune2deploy.measure import Comparison, LatencyStats, Measurement
from prune2deploy.plan.allocate import Gap
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.plan.plan import Plan
from prune2deploy.progress import Progress, silent
from prune2deploy.recover import Finetuned
from prune2deploy.rundir import RunDir
from prune2deploy.search.accuracy import Top1
from prune2deploy.search.candidate import Built
from prune2deploy.search.payoff import Payoff
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming

MARGIN = 0.005  # how far below the budget to aim, beyond the half-width of the interval
WIDEST = 0.1  # greatest half-width that lowers the aim
Finetune = Callable[[nn.Module], nn.Module | Finetuned | None]


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
        input_names: Names of the inputs in the ONNX file; empty for ``input``, or where there are
            several for those of the parameters of the forward pass.
        output_names: Names of the outputs in the ONNX file; empty for names made from the
            structure of the output.
        progress: Hears of every step.
        spelled: Gives a note with the names that options have for whoever asked for the job.
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
    spelled: Callable[[str], str] = str

    def builds_again(self, precision: str) -> bool:
        """Whether the final model is a build of its own.

        It gets accuracy back, or in int8 the ranges of all samples: the search takes a few.
        """
        return serves(self.batches, "bn") or self.finetune is not None or precision == "int8"


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
        budget: What it was to meet.
        budget_ms: The budget in this session: for a speed-up, the baseline's median over it.
        value_ms: The percentile that the budget is for.
        bound_ms: Upper 95 % confidence bound of it, which has to be within the budget.
        verdict: ``met``, ``missed`` or ``uncertain``.
    """

    built: Built
    profile: tuple[OperatorTiming, ...]
    comparison: Comparison
    predicted_ms: float
    budget: Budget
    budget_ms: float
    value_ms: float
    bound_ms: float
    verdict: str

    @property
    def share(self) -> float:
        """Measured latency as a fraction of the budget."""
        return self.value_ms / self.budget_ms

    @property
    def filled(self) -> bool:
        """Whether the budget is met and too little is left of it to go on."""
        return self.verdict == "met" and self.bound_ms >= FILL * self.budget_ms


@dataclass(frozen=True, eq=False)
class Outcome:
    """What a run ended with.

    Attributes:
        verdict: ``met``, ``unreachable``, ``missed`` or ``uncertain``.
        module: The pruned module.
        final: Its build and measurement.
        baseline: What it is compared with.
        attempts: Every measured candidate in order.
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
        starved: Whether the search ended for want of builds, so that more could come nearer.
        superseded: Final builds of earlier sessions, which were allowed fewer builds.
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
    accuracy: Top1 | None = None
    starved: bool = False
    superseded: tuple[Built, ...] = ()


def judge(comparison: Comparison, budget: Budget) -> tuple[float, float, float, str]:
    """Compare a measurement with the budget.

    A budget as a speed-up is judged by the interval of the measured ratio, one in milliseconds by
    that of the median in this session. The measured 95th and 99th percentiles are upper confidence
    bounds already, so such a budget is met or missed. It is uncertain where there were too few
    samples for a bound, or where the median is within the budget and a disturbed host may have
    caused the slow runs.

    Returns:
        Budget in this session, the latency it is for, its upper bound, and the verdict.
    """
    measured, limit = comparison.candidate, budget.latency_ms
    if limit is None:
        assert budget.speedup is not None
        whole = comparison.reference.p50_ms
        low, high = (whole * bound for bound in comparison.ratio_ci95)
        limit = whole / budget.speedup
        return limit, measured.p50_ms, high, measure.verdict((low, high), limit)
    if budget.percentile == 50:
        verdict = measure.verdict(measured.ci95_ms, limit)
        return limit, measured.p50_ms, measured.ci95_ms[1], verdict
    value = percentile_ms(measured, budget.percentile)
    disturbed = measured.p50_ms <= limit < value and measure.DISTURBED & set(comparison.flags)
    if budget.percentile in measured.unbounded or disturbed:
        return limit, value, value, "uncertain"
    return limit, value, value, "met" if value <= limit else "missed"


def percentile_ms(latency: LatencyStats, percentile: int) -> float:
    """The measured 50th, 95th or 99th percentile."""
    return {50: latency.p50_ms, 95: latency.p95_ms, 99: latency.p99_ms}[percentile]


def half_width(interval: tuple[float, float]) -> float:
    """Half-width of an interval of positive values, as a fraction."""
    low, high = interval
    return (high - low) / (high + low)


def best(
    attempts: Sequence[Attempt], worth: Callable[[Plan], float] = lambda _: 0.0, near: float = 0.0
) -> Attempt:
    """The worthiest that meets the budget; else the fastest there is.

    Args:
        attempts: What was measured.
        worth: What a plan is worth; higher is better.
        near: Worths that differ by no more tell plans apart no better than the budget that they
            use: the slowest of these is taken. It is none that another one is wider than.
    """
    met = [a for a in attempts if a.verdict == "met"]
    if not met:
        return min(attempts, key=lambda a: a.share)
    widest = [a for a in met if not any(b.built.plan.wider(a.built.plan) for b in met)]
    found = {a.built.number: worth(a.built.plan) for a in widest} if len(widest) > 1 else {}
    top = max(found.values(), default=0.0)
    close = [a for a in widest if found.get(a.built.number, top) >= top - near]
    return max(close, key=lambda a: a.share)


def unfilled(found: Attempt, options: RunOptions, *, starved: bool) -> tuple[str, ...]:
    """Why a search ended although the budget is not filled, where it can be said.

    Args:
        found: The best that was measured.
        options: What was asked for.
        starved: Whether it ended for want of builds.
    """
    if starved:
        return (
            f"all {options.max_builds} builds are used; more of them (--max-builds) may come "
            "nearer to the budget",
        )
    if found.verdict != "met":
        return ()
    caps = {"--max-size-mb": options.max_size_mb, "--max-macs": options.max_macs}
    within = ", ".join(f"{name} {cap}" for name, cap in caps.items() if cap is not None)
    return (
        f"{100 * found.share:.1f} % of the budget is used: no other widths that this run may "
        f"choose {f'within {within} ' if within else ''}are predicted to fit into the rest and "
        "to be worth as much",
    )


def bounded(options: RunOptions) -> tuple[str, ...]:
    """Which options keep the smallest plan from being smaller, as a note."""
    ratio, keep = options.max_pruning_ratio, options.model.keep
    by = [] if ratio is None else [f"--max-pruning-ratio {ratio:g}"]
    by += [f"--keep {name}" for name in keep]
    if not by:
        return ()
    return (f"the smallest plan is as large as it is because of {', '.join(by)}",)


def aim(limit_ms: float, half_width: float) -> float:
    """Where to aim so that the upper end of an interval of ``half_width`` meets the limit."""
    return limit_ms * (1 - min(half_width, WIDEST) - MARGIN)


def expected_half_width(baseline: Baseline, attempts: Sequence[Attempt], budget: Budget) -> float:
    """Half-width to expect of the interval of the next verdict: that of the last; a fraction."""
    if budget.percentile != 50:
        return 0.0  # the measured percentile is a bound already
    last = attempts[-1].comparison if attempts else None
    if budget.latency_ms is not None:
        return half_width((last.candidate if last else baseline.measured.latency).ci95_ms)
    return half_width(last.ratio_ci95) if last else 0.0
