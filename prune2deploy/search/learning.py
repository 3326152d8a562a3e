"""What a run learns about the latency of its model, and what it keeps for later runs.

In: the builds of a run as they come, and the cache of the device. Out: the latency model fitted
on all of them. Three sources are used: this run's own builds; builds of the same model in earlier
runs, which replace probes; and timings of operators that other models have in common with this
one (``siblings``), which spare the last probe where they cover most of the time.

Where blocks are taken out, the latency model of the whole one goes on without their operators;
further builds correct its offset. (A model learnt anew would need probes of its own, and would
know less: operators that were left keep the cells they were measured at.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

from prune2deploy.graph.axes import Graph
from prune2deploy.plan import latency_model
from prune2deploy.plan.costs import Point
from prune2deploy.plan.latency_model import Build, LatencyModel
from prune2deploy.search import candidate, depth, probing, recall
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.job import Attempt, Baseline, half_width
from prune2deploy.search.recall import Recalled

COVERED = 0.8  # share of the unpruned model's time that other models' timings must know
CELLS = 4  # timings at different widths that an operator needs to count as known


class Lessons:
    """The builds of one run and the latency model that they and earlier runs make.

    Attributes:
        graph: Axes of the model, without the blocks that were taken out.
        removed: Names of those blocks.
        probes: Builds that were profiled only.
        attempts: Builds that were measured.
        recalled: What earlier runs left.
        timings: The cache of this device.
        multiple: Channel multiple of the device.
        multiple_source: Where that is from.
        whole: The latency model of all blocks, where some were taken out.
    """

    def __init__(self, shop: Workshop, baseline: Baseline, *, cache: bool) -> None:
        self.timings = recall.timings(shop.target, shop.backend, cache=cache)
        self.multiple, self.multiple_source = probing.settle(shop, self.timings)
        self._shop, self._baseline = shop, baseline
        self._journal = shop.run.journal
        self.graph: Graph = shop.graph
        self.removed: tuple[str, ...] = ()
        self.probes: list[Built] = []
        self.attempts: list[Attempt] = []
        self.recalled = Recalled()
        self.whole: LatencyModel | None = None
        self._shorter: LatencyModel | None = None
        self._points: tuple[Point, ...] = ()

    @property
    def builds(self) -> int:
        """Engine builds so far, besides the baseline."""
        return len(self.probes) + sum(a.built.number > 0 for a in self.attempts)

    @property
    def tried(self) -> list[Mapping[str, int]]:
        """Counts of the measured plans that lack the same blocks."""
        return [a.built.plan.counts for a in self.attempts if a.built.plan.removed == self.removed]

    def recall(self) -> str:
        """Use builds of this model from earlier runs; returns a note, empty if there are none."""
        self.recalled = self._journal.once(
            "recalled", Recalled, lambda: Recalled(self.timings.builds(self.graph))
        )
        many = len(self.recalled.builds)
        return f"{many} builds of earlier runs on this device were recalled" if many else ""

    def siblings(self) -> float:
        """Use timings of operators that this model shares with others measured on the device.

        Returns:
            Share of the unpruned model's profiled time in operators that these timings cover.
        """

        def work() -> Recalled:
            wanted = latency_model.signatures(self.graph, self._all())
            return Recalled(points=self.timings.points(wanted, self.multiple))

        self._points = self._journal.once("recalled of siblings", Recalled, work).points
        cells = Counter(point.signature for point in self._points)
        model = self.fit()
        times = dict(zip(model.operators, model.predict_operators({}), strict=True))
        known = [t for o, t in times.items() if not o.axes or cells[o.signature] >= CELLS]
        return sum(known) / max(sum(times.values()), 1e-12)

    def fit(self) -> LatencyModel:
        """Fit the latency model on everything that was profiled and measured.

        One profile alone cannot tell which axis an operator's width belongs to; the whole
        model's latency by its multiply-accumulates has to do until there is a second.
        """
        if self._shorter is not None:
            return latency_model.anchored(self._shorter, self._measured())
        builds = self._all()
        if len(builds) == 1:
            builds = [replace(builds[0], profile=())]
        return latency_model.fit(self.graph, builds, multiple=self.multiple, known=self._points)

    def keep(self) -> None:
        """Add what this run has built to what later ones may recall."""
        if not self.removed:
            whole_ms = self._baseline.p50_ms
            self.timings.keep(self.graph, self._own(), whole_ms, self.multiple)

    def take_out(self, names: Sequence[str], model: LatencyModel) -> None:
        """Continue without these blocks; ``model`` is the latency model that still has them."""
        self.keep()
        self.whole = self.whole or model
        self._shorter = depth.shortened(self.graph, model, names)
        self.removed = (*self.removed, *names)
        self.graph = self._shop.graph.without(self.removed)

    def _all(self) -> list[Build]:
        """This run's builds, then those recalled; latencies in baseline milliseconds."""
        shares = [(b, b.measured_ms) for b in self.recalled.builds]
        whole_ms = self._baseline.p50_ms
        return [
            *self._own(),
            *(replace(b, measured_ms=share and share * whole_ms) for b, share in shares),
        ]

    def _own(self) -> list[Build]:
        """Everything that this run has profiled of the whole model, the unpruned one first."""
        base = self._baseline
        probes = (Build(b.plan.counts, candidate.profile(self._shop, b)) for b in self.probes)
        return [Build({}, base.profile, base.p50_ms), *probes, *self._measured()]

    def _measured(self) -> list[Build]:
        """The attempts that lack the same blocks."""
        return [
            Build(
                a.built.plan.counts,
                a.profile,
                a.comparison.ratio * self._baseline.p50_ms,
                half_width(a.comparison.ratio_ci95),
            )
            for a in self.attempts
            if a.built.plan.removed == self.removed
        ]
