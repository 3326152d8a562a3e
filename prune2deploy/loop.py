"""The main path: from a model and a budget to a smaller model that was measured to meet it.

    open → baseline → probes → fit → (allocate → build → measure → correct)* → recover → outcome

In: a :class:`Job`. Out: an :class:`Outcome`. The one cycle of the product is here: what was
measured goes back into the latency model, which allocates anew. Every finished step is in the
journal of the run directory, so a run that was stopped goes on without doing anything twice.

Latencies inside the search are in *baseline milliseconds*: a candidate's measured ratio to the
baseline times the baseline's first measured median. Machines change speed between two
measurements; the ratio, taken from interleaved runs, does not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from prune2deploy import candidate, measure
from prune2deploy.backends import registry
from prune2deploy.candidate import Built, Workshop
from prune2deploy.config import FILL, Budget, RunOptions
from prune2deploy.errors import BudgetUnreachable, ConfigError, MissingBackend
from prune2deploy.graph import Graph, trace
from prune2deploy.importance import score
from prune2deploy.measure import Comparison, Measurement
from prune2deploy.plan import allocate, latency_model
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.plan.plan import Plan
from prune2deploy.progress import Progress, silent
from prune2deploy.prune import apply as apply_plan
from prune2deploy.recover import reestimate_batchnorm
from prune2deploy.rundir import RunDir
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming

MARGIN = 0.005  # aimed below the budget, beside the half-width of the interval
WIDEST = 0.03  # half-width up to which a wide interval lowers the aim
Finetune = Callable[[nn.Module], nn.Module | None]


@dataclass(frozen=True, eq=False)
class Job:
    """What one run works on.

    Attributes:
        module: The model; it is not changed.
        example_inputs: What ``module(*example_inputs)`` takes.
        target: Where the result runs.
        options: The checked options.
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
    options: RunOptions
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


def prune_to_budget(job: Job) -> Outcome:
    """Prune until the measured latency meets the budget, or say that it cannot be met.

    Raises:
        TraceError: The model does not run or has nothing to prune.
        MissingBackend: The target is not usable here.
        ParityError: A build gives other outputs than the pruned module.
        BackendError: A build failed.
        MeasureError: A measurement failed.
    """
    shop = open_workshop(job)
    search = Search(shop, job, channel_multiple(shop.target), measure_baseline(shop))
    if search.meets_already():
        return search.unpruned()
    search.probe()
    found = search.correct()
    return search.recover(found)


def open_workshop(job: Job) -> Workshop:
    """Check that the target is usable, and trace the model."""
    target = candidate.with_precision(job.target, job.options.model.precision)
    if target.precision == "int8" and job.batches is None:
        raise ConfigError("precision int8 needs calibration data: add --data RECIPE")
    backend = registry.for_target(target)
    there = backend.availability(target)
    if not there.usable:
        raise MissingBackend(f"target {target.name}: {there.reason}; {there.fix}")
    graph = trace(job.module, job.example_inputs)
    return Workshop(
        job.module,
        job.example_inputs,
        graph,
        target,
        backend,
        job.run,
        job.progress,
        job.options.max_builds,
        job.input_names,
        job.output_names,
        job.batches,
    )


def channel_multiple(target: Target) -> int:
    """The width step of the target: its profile's, else this machine's."""
    return target.channel_multiple or measure.native_channel_multiple()


def measure_baseline(shop: Workshop) -> Baseline:
    """Build, profile and measure the unpruned model."""
    built = candidate.build(shop, 0, "baseline", Plan({}))
    profile = candidate.profile(shop, built)

    def work() -> Measurement:
        shop.say("measuring", 0)
        (shop.run / "raw").mkdir(exist_ok=True)
        return measure.single(
            shop.engine(built), shop.target, raw_path=shop.run / "raw/baseline.npz"
        )

    measured = shop.run.journal.once("00-baseline/measure", Measurement, work)
    return Baseline(built, profile, measured)


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
