"""What a report says, as frozen values; every rendering reads them and nothing else.

In: plain numbers that the loop or a sweep found. Out: JSON text and back, so that a report can be
rendered again without the run. A latency is *measured* unless its name begins with ``predicted``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from prune2deploy.errors import ConfigError
from prune2deploy.journal import decode, encode

SCHEMA = 1  # 1: as below


@dataclass(frozen=True)
class Row:
    """One model of the result table.

    Attributes:
        p50_ms: Measured median wall time of one inference, milliseconds.
        p95_ms: Upper 95 % bound of the 95th percentile of measured wall time, milliseconds.
        p99_ms: The same of the 99th.
        ci95_ms: 95 % interval of the median, milliseconds.
        samples: Inferences timed.
        params: Parameters, buffers not counted.
        macs: Multiply-accumulates of one inference (whole batch).
        bytes: Size of the ONNX file, with weights that lie beside it.
        unbounded: Percentiles among 95 and 99 that there were too few samples for: the largest
            sample stands in for their bound.
    """

    p50_ms: float
    p95_ms: float
    p99_ms: float
    ci95_ms: tuple[float, float]
    samples: int
    params: int
    macs: int
    bytes: int
    unbounded: tuple[int, ...] = ()


@dataclass(frozen=True)
class ParityLine:
    """Agreement of two stages on ``output``, the worst one; see ``parity.Parity``.

    Attributes:
        error: The figure that is held against ``tolerance``; ``None`` for ``max_rel``.
        judged: Which figure that is: ``max_rel`` or ``rms_rel``.
    """

    border: str
    max_abs: float
    max_rel: float
    tolerance: float
    output: str
    passed: bool
    error: float | None = None
    judged: str = "max_rel"

    def text(self) -> str:
        """One line for the report."""
        error = self.max_rel if self.error is None else self.error
        kind = "root mean square" if self.judged == "rms_rel" else "largest"
        by_accuracy = ", but accuracy decides" if self.passed != (error <= self.tolerance) else ""
        return (
            f"{self.border}: {kind} difference {error:.2g} of the output's scale "
            f"(tolerance {self.tolerance:g}{by_accuracy}), {self.max_abs:.2g} absolute at most, "
            f"worst output {self.output!r}"
        )


@dataclass(frozen=True)
class AxisLine:
    """One axis of the model.

    Attributes:
        name: As in the graph.
        kept: Channels left.
        size: Channels before.
        frozen: Why it had to keep all, or ``None``.
        off_step: The kept width is no multiple of what the target runs well at.
    """

    name: str
    kept: int
    size: int
    frozen: str | None = None
    off_step: bool = False


@dataclass(frozen=True)
class LayerLine:
    """One operator: profiled milliseconds before and after, and as predicted.

    An operator that one of the two engines lacks has no time there.
    """

    name: str
    kind: str
    before_ms: float | None
    after_ms: float | None
    predicted_ms: float | None = None

    @property
    def most_ms(self) -> float:
        """The larger time of the two."""
        return max(self.before_ms or 0, self.after_ms or 0)


@dataclass(frozen=True)
class BuildLine:
    """One engine build besides the baseline, in order; ``step`` is probe, correction or final."""

    number: int
    step: str
    params: int
    macs: int
    predicted_ms: float | None = None
    measured_ms: float | None = None
    ci95_ms: tuple[float, float] | None = None
    verdict: str = ""


@dataclass(frozen=True)
class Limits:
    """What keeps the model from being faster.

    Attributes:
        floor_ms: Measured latency of the smallest plan allowed, where the budget was out of reach;
            else ``None``.
        fixed_share: Share of the baseline's profiled time that no width changes; ``None`` where
            no plan was needed, or the runtime does not profile operators.
        overhead_ms: Baseline time outside its operators (calls, copies), milliseconds; ``None``
            where the host was not quiet enough to tell.
        channel_multiple: Width step of the target.
        multiple_source: Where that step is from.
        memory_share: Share of the baseline's operator time that the latency model ascribes to
            elements read and written, not to multiply-accumulates; ``None`` without a model.
        gap: How much more other widths of the same predicted latency could keep at most, as a
            share of what widths are worth; ``None`` where the exact solver found no bound.
        gap_exact: False where that is an estimate.
    """

    floor_ms: float | None
    fixed_share: float | None
    overhead_ms: float | None
    channel_multiple: int
    multiple_source: str
    memory_share: float | None = None
    gap: float | None = None
    gap_exact: bool = True


@dataclass(frozen=True)
class AccuracyLine:
    """Top-1 accuracy of the ONNX files as fractions, on samples of the run's own data."""

    samples: int
    baseline: float
    final: float


@dataclass(frozen=True)
class RunReport:
    """Everything that the report of one run shows; ``removed`` are blocks that were taken out.

    ``curve`` is ``((predicted milliseconds, retained worth 0..1), ...)``, both rising. The verdict
    is on ``bound_ms``, the upper 95 % confidence bound of ``judged_ms``, which is the measured
    latency at ``percentile``; ``None`` in reports of earlier versions.
    """

    model: str
    target: str
    met: bool
    verdict: str
    budget_ms: float
    speedup: float
    builds: int
    seconds: float
    baseline: Row
    final: Row
    limits: Limits
    parity: tuple[ParityLine, ...] = ()
    axes: tuple[AxisLine, ...] = ()
    layers: tuple[LayerLine, ...] = ()
    steps: tuple[BuildLine, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    curve: tuple[tuple[float, float], ...] = ()
    accuracy: AccuracyLine | None = None
    percentile: int = 50
    judged_ms: float | None = None
    bound_ms: float | None = None
    kind: str = "run"
    schema: int = SCHEMA

    def filling(self) -> str:
        """How much of the budget the measured latency uses, in words, with its upper bound."""
        name, judged = f"p{self.percentile}", self.judged_ms or self.final.p50_ms
        bound = f", its upper 95 % bound {(self.bound_ms or judged) / self.budget_ms:.1%}"
        if self.percentile in self.final.unbounded:
            name, bound = f"largest sample (too few bound {name})", ""
        elif self.percentile != 50:
            name, bound = f"upper 95 % bound of {name}", ""
        return f"measured {name} is {judged / self.budget_ms:.1%} of it{bound}"


@dataclass(frozen=True)
class SweepPoint:
    """One ratio of a sweep: fraction of channels removed, size, cost, measured latency.

    Attributes:
        speedup: Measured baseline latency over this model's, from interleaved pairs.
        speedup_ci95: Its 95 % interval.
    """

    ratio: float
    macs: int
    params: int
    p50_ms: float
    ci95_ms: tuple[float, float]
    speedup: float
    speedup_ci95: tuple[float, float]


@dataclass(frozen=True)
class SweepReport:
    """Everything that the report of one sweep shows."""

    model: str
    target: str
    channel_multiple: int
    baseline_ms: float
    points: tuple[SweepPoint, ...]
    environment: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    kind: str = "sweep"
    schema: int = SCHEMA


def to_json(report: RunReport | SweepReport) -> str:
    """Write a report as JSON text."""
    return json.dumps(encode(report), indent=2) + "\n"


def from_json(text: str | bytes, source: Path) -> RunReport | SweepReport:
    """Read what :func:`to_json` wrote; ``source`` is named when it did not.

    Raises:
        ConfigError: The text is no report of this version.
    """
    try:
        data = json.loads(text)
        kind = {"run": RunReport, "sweep": SweepReport}[data["kind"]]
        if data["schema"] != SCHEMA:
            raise ConfigError(f"{source}: report schema {data['schema']!r}, expected {SCHEMA}")
        return cast("RunReport | SweepReport", decode(kind, data))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{source}: not a report ({error!r}), expected the report.json of a run or sweep"
        ) from error
