"""What the budget benchmark measures with: builds beside one dense model, and two ways to search.

In: a module, its inputs, a target. Out: measured latency ratios, of which each set of widths is
measured once, because widths decide latency and weights do not. ``bisect`` is what a user of a
library without a latency model does; ``correct`` is the cycle of this package's loop (fit,
allocate, build, measure) for choices that the caller makes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from prune2deploy import measure
from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine
from prune2deploy.exporting import export, simplify
from prune2deploy.graph import trace
from prune2deploy.plan.allocate import Allocation, allocate
from prune2deploy.plan.choices import Choice, Problem
from prune2deploy.plan.filling import fuller
from prune2deploy.plan.latency_model import Build, LatencyModel, fit
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.search.job import aim
from prune2deploy.search.planning import NUDGE, PlanRequest, propose, pruned
from prune2deploy.surgery.slicing import apply
from prune2deploy.target import Target

FILL = 0.98  # of the wanted latency: what is measured between this and 1 is at equal latency
REACH = 5  # nudges by which a plan may be predicted slower than is aimed for
WIDEST = 0.95  # highest pruning ratio that the bisection tries


@dataclass(frozen=True)
class Trial:
    """One build that was measured.

    Attributes:
        setting: Pruning ratio, for a bisection; counts per axis, for a plan.
        share: Measured latency over the dense model's.
        low: Lower end of its 95 % interval.
        high: Upper end.
        predicted: What a latency model had predicted, as such a share.
    """

    setting: float | Mapping[str, int]
    share: float
    low: float
    high: float
    predicted: float | None = None


Searches = dict[str, dict[float, list[Trial]]]
"""Per method: wanted latency to the builds of the search for it."""


class Seen(NamedTuple):
    """A latency measured beside the dense model: the ratio and its 95 % interval."""

    ratio: float
    low: float
    high: float


class Yard:
    """Builds models for one target, and measures each beside the dense model.

    Attributes:
        graph: The dense model's graph.
        builds: What the latency model is fitted on: baseline, probes, and what was measured.
        measured: Sets of widths that were measured.
    """

    def __init__(
        self, module: nn.Module, inputs: tuple[Tensor, ...], target: Target, folder: Path
    ) -> None:
        self.module, self.inputs, self.target, self.folder = module, inputs, target, folder
        self.backend = registry.for_target(target)
        self.multiple = target.channel_multiple or measure.native_channel_multiple()
        self.graph = trace(module, inputs)
        self.notes = folder / "measured.json"
        known = json.loads(self.notes.read_text()) if self.notes.exists() else {}
        self.measured: dict[str, Seen] = {k: Seen(*v) for k, v in known.items() if k != "dense"}
        self._engines: dict[str, Engine] = {}
        self.base = self.engine(module)
        self.base_ms: float = (
            known["dense"] if known else measure.single(self.base, target).latency.p50_ms
        )
        self.builds: list[Build] = []

    def engine(self, module: nn.Module) -> Engine:
        """Export, simplify and build; once per set of widths."""
        key = widths(module)
        if key not in self._engines:
            folder = self.folder / str(len(self._engines))
            exported = export.to_onnx(module.eval(), self.inputs, folder / "exported.onnx")
            report = simplify.simplify(exported, folder / "model.onnx")
            self._engines[key] = self.backend.build(report.path, self.target, folder / "engine")
        return self._engines[key]

    def compare(self, module: nn.Module) -> Seen:
        """Measure beside the dense model; once per set of widths, kept in ``measured.json``."""
        key = widths(module)
        if key not in self.measured:
            found = measure.compare(self.engine(module), self.base, self.target)
            self.measured[key] = Seen(found.ratio, *found.ratio_ci95)
            self.notes.write_text(json.dumps({"dense": self.base_ms, **self.measured}))
        return self.measured[key]

    def pruned(self, counts: Mapping[str, int]) -> nn.Module:
        """The dense model with the first channels of every axis, for its latency alone."""
        kept = {a: tuple(range(c)) for a, c in counts.items() if c < self.graph[a].size}
        return apply(self.module, self.graph, Plan(kept), self.inputs) if kept else self.module

    def learn(self, counts: Mapping[str, int], *, whole: bool) -> None:
        """Profile a build for the latency model, with its measured latency where asked."""
        module = self.pruned(counts)
        beside = (self.base, self.builds[0].profile) if self.builds else None
        profile = measure.profile(self.engine(module), self.target, beside=beside)
        ms = self.base_ms * (self.compare(module).ratio if counts else 1.0) if whole else None
        self.builds.append(Build(counts, profile, ms))

    def probe(self, number: int) -> None:
        """Profile the dense model and ``number`` random aligned plans."""
        self.learn({}, whole=True)
        for plan in probes(self.graph, number, multiple=self.multiple, seed=0):
            self.learn(plan, whole=False)

    def fit(self) -> LatencyModel:
        """The latency model of everything learnt so far."""
        return fit(self.graph, self.builds, multiple=self.multiple)


def widths(module: nn.Module) -> str:
    """The shapes of all parameters, which decide the latency."""
    return " ".join("x".join(map(str, p.shape)) for p in module.parameters())


def bisect(
    make: Callable[[float], nn.Module], yard: Yard, limit: float, most: int = 8
) -> list[Trial]:
    """Halve the pruning ratio until a build lies in the window; at most ``most`` builds."""
    low, high = 0.0, WIDEST
    trials: list[Trial] = []
    while len(trials) < most:
        ratio = (low + high) / 2
        seen = yard.compare(make(ratio))
        trials.append(Trial(ratio, *seen))
        if FILL * limit <= seen.ratio <= limit:
            break
        low, high = (low, ratio) if seen.ratio < limit else (ratio, high)
    return trials


def correct(
    yard: Yard,
    among: tuple[Choice, ...],
    limit: float,
    most: int = 6,
    rank: Callable[[Mapping[str, int]], float] | None = None,
    before: Sequence[Trial] = (),
) -> list[Trial]:
    """Fit, allocate, build and measure until a build lies in the window; goes on from ``before``.

    Where no worthier plan is left to try and the window is not reached, slower ones that are worth
    nearly as much follow: only what takes as long can be compared.
    """
    trials = list(before)
    limit_ms = limit * yard.base_ms
    while len(trials) < len(before) + most:
        problem = Problem(yard.graph, yard.fit(), among, limit_ms)
        up = any(trial.share <= limit for trial in trials)
        tried = [pruned(yard.graph, t.setting) for t in trials if isinstance(t.setting, Mapping)]
        request = PlanRequest(problem, aim(limit_ms, NUDGE), tried, up, rank)
        found = propose(request) or (slower(request) if up else None)
        if found is None:
            break
        if all(build.counts != found.counts for build in yard.builds):
            yard.learn(found.counts, whole=True)
        seen = yard.compare(yard.pruned(found.counts))
        trials.append(Trial(found.counts, *seen, found.predicted_ms / yard.base_ms))
        if FILL * limit <= seen.ratio <= limit:
            break
    return trials


def slower(request: PlanRequest) -> Allocation | None:
    """A worthy plan that is predicted to lie in the window, or just beyond, and was not tried."""
    whole = {axis.name: axis.size for axis in request.problem.graph.axes}
    least = FILL * request.problem.budget_ms
    for beyond in range(REACH):
        problem = replace(request.problem, budget_ms=request.aim_ms * (1 + NUDGE * beyond))
        best = allocate(problem)
        starts = [best, *(replace(best, counts={**whole, **tried}) for tried in request.tried)]
        for plan in (plan for start in starts for plan in fuller(problem, start, least)):
            if not request.was_tried(plan.counts):
                return plan
    return None


def delivered(trials: Sequence[Trial], limit: float) -> Trial | None:
    """The slowest build that keeps the limit."""
    met = [trial for trial in trials if trial.share <= limit]
    return max(met, key=lambda trial: trial.share) if met else None


def recalled(kept: Path) -> Searches:
    """The builds that an earlier run has left, if any."""
    noted = json.loads(kept.read_text()) if kept.exists() else {}
    return {
        method: {limit: [Trial(**trial) for trial in trials] for limit, trials in of}
        for method, of in noted.items()
    }


def pooled(searches: Mapping[float, list[Trial]]) -> list[Trial]:
    """All builds of some searches."""
    return [trial for trials in searches.values() for trial in trials]


def even(searches: Mapping[float, list[Trial]], limit: float) -> bool:
    """Whether what is delivered for a limit lies in the window below it."""
    best = delivered(pooled(searches), limit)
    return best is not None and best.share >= FILL * limit


def note(kept: Path, searches: Searches) -> None:
    """Write what ``recalled`` reads."""
    noted = {
        method: [(limit, [asdict(trial) for trial in trials]) for limit, trials in of.items()]
        for method, of in searches.items()
    }
    kept.write_text(json.dumps(noted))
