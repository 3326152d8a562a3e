"""The main path: from a model and a budget to a smaller model that was measured to meet it.

    open → baseline → probes → (fit → allocate → build → measure)* → recover → outcome

In: a :class:`~prune2deploy.search.job.Job`. Out: an
:class:`~prune2deploy.search.job.Outcome`. The one cycle of the product is here: what was measured
goes back into the latency model, which allocates anew.
Every finished step is in the journal of the run directory, so a run that was stopped goes on
without doing anything twice.

Latencies inside the search are in *baseline milliseconds*: a candidate's measured ratio to the
baseline times the baseline's first measured median. Machines change speed between two
measurements; the ratio, taken from interleaved runs, does not.

Widths decide latency and weights do not, so the search works on models as pruned; accuracy is
recovered once, on the plan that was found, and the recovered model is built and measured again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import nn

from prune2deploy import measure
from prune2deploy.calibration import notices, serves
from prune2deploy.config import RunOptions
from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Block, Graph
from prune2deploy.importance import score
from prune2deploy.measure import Comparison, Goal
from prune2deploy.plan.allocate import Curve, Gap, channels, optimality_gap
from prune2deploy.plan.choices import Choice, Problem, choices
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.search import accuracy, candidate, depth, payoff, planning, worth
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.job import (
    Attempt,
    Baseline,
    Job,
    Outcome,
    aim,
    best,
    expected_half_width,
    judge,
    percentile_ms,
    unfilled,
)
from prune2deploy.search.learning import COVERED, Lessons
from prune2deploy.search.opening import measure_baseline, open_workshop
from prune2deploy.search.payoff import Payoff
from prune2deploy.search.planning import Question, Wanted
from prune2deploy.search.recovery import Told, recovered
from prune2deploy.surgery.slicing import apply as apply_plan


def prune_to_budget(job: Job, options: RunOptions) -> Outcome:
    """Prune until the measured latency meets the budget, or say that it cannot be met.

    Raises:
        ConfigError: Too few builds are allowed for a search and a final model.
        TraceError: The model does not run or has nothing to prune.
        MissingBackend: The target is not usable here.
        ParityError: A build gives other outputs than the pruned module.
        BackendError: A build failed.
        MeasureError: A measurement failed.
    """
    if job.recovers and options.max_builds < 2:
        raise ConfigError(
            f"--max-builds {options.max_builds}: found data or training, after which the final "
            "model is built once more, expected at least 2"
        )
    shop = open_workshop(job, options.model, options.max_builds, options.max_drop)
    shop, paid = payoff.settle(shop, asked=options.model.precision is not None)
    search = Search(job, options, shop, measure_baseline(shop))
    search.paid = paid
    search.unpruned()
    if not search.done:
        search.probe()
        search.correct()
    return search.recover()


class Search:
    """The search of one run: what it has learnt so far, and what it builds next."""

    def __init__(self, job: Job, options: RunOptions, shop: Workshop, baseline: Baseline) -> None:
        self.job, self.options, self.shop, self.baseline = job, options, shop, baseline
        self.budget = options.budget
        deadline = self.budget.latency_ms
        self.goal = None if deadline is None else Goal(deadline, self.budget.percentile)
        self.lessons = Lessons(shop, baseline, cache=options.cache)
        self.floor_missed = False
        self.notes = list(notices(job.batches))
        self.paid: Payoff | None = None
        self.model: LatencyModel | None = None
        self.curve: Curve = ()
        self.ranked = 0

    def unpruned(self) -> None:
        """Where the budget is in milliseconds, see first whether the model as it is meets it."""
        limit = self.budget.latency_ms
        if limit is None or self.baseline.p50_ms > limit or not self._within_caps():
            return
        attempt = self._measure(self.baseline.built, self.baseline.p50_ms)
        if attempt.verdict == "met":
            self.attempts.append(attempt)
            self.notes.append("the model meets the budget as it is; nothing was pruned")

    def _within_caps(self) -> bool:
        """Whether the model as it is keeps the caps on size and multiply-accumulates."""
        params, macs = self.options.max_params(self.shop.target.precision), self.options.max_macs
        return (params is None or self.graph.params() <= params) and (
            macs is None or self.graph.macs() <= macs
        )

    @property
    def graph(self) -> Graph:
        """The model, without the blocks that were taken out."""
        return self.lessons.graph

    @property
    def attempts(self) -> list[Attempt]:
        """Every measured candidate."""
        return self.lessons.attempts

    @property
    def done(self) -> bool:
        """Whether an attempt meets the budget and fills it, or needs no pruning at all."""
        return any(a.filled or (a.verdict == "met" and a.built.number == 0) for a in self.attempts)

    @property
    def builds_left(self) -> int:
        """Builds that the search may still use; recovery needs one at the end."""
        return self.options.max_builds - int(self.job.recovers) - self.lessons.builds

    def probe(self) -> None:
        """Build and profile random aligned plans: the latency model is learnt from them."""
        lessons = self.lessons
        self.scores = score(self.options.importance, self.job.module, self.graph, self.job.batches)
        trains = self.job.finetune is not None
        kept = lessons.timings.losses
        self.worth = worth.find(self.shop, self.scores, lessons.multiple, kept, trains=trains)
        self.rank = worth.ranking(self.shop, self.scores, self.worth)
        self.choices = self._offer(self.graph)
        self.notes += [note for note in (self.worth.note, lessons.recall()) if note]
        known = len({tuple(sorted(b.counts.items())) for b in lessons.recalled.builds})
        wanted = max(0, min(self.options.probes - known, self.builds_left - 1))
        wanted = wanted if self.baseline.profile else 0  # probes are profiled, not measured
        self._draw(wanted)
        lessons.keep()

    def _draw(self, wanted: int) -> None:
        """Build up to ``wanted`` probes; the last is spared where other models taught enough."""
        drawn = probes(
            self.graph, wanted, multiple=self.lessons.multiple, seed=self.options.model.seed
        )
        for number, counts in enumerate(drawn, start=1):
            if 1 < number == wanted:
                covered = self.lessons.siblings()
                if covered >= COVERED:
                    self.notes.append(
                        f"a probe build was spared: timings of other models on this device cover "
                        f"{covered:.0%} of the time of this one"
                    )
                    return
            self._probe(number, counts)

    @property
    def _next(self) -> int:
        """Number of the next build."""
        return len(self.lessons.probes) + len(self.attempts) + 1

    def _plan(self, counts: Mapping[str, int]) -> Plan:
        """The plan that keeps the best channels, without the blocks that were taken out."""
        return replace(channels(self.graph, self.scores, counts), removed=self.lessons.removed)

    def _probe(self, number: int, counts: Mapping[str, int]) -> None:
        built = candidate.build(self.shop, number, "probe", self._plan(counts))
        candidate.profile(self.shop, built)
        self.lessons.probes.append(built)

    def _shorten(self) -> bool:
        """Take out blocks, since the narrowest widths miss the budget; False if none are left.

        The first time those that the worthiest plan lacks, the second time all.
        """
        left = self._removable
        if not left or not self.builds_left or not self.baseline.profile:
            return False
        self.model = self.lessons.fit()
        names = [block.name for block in left] if self.lessons.removed else self._expendable()
        if not names:
            return False
        self.lessons.take_out(names, self.model)
        self.choices = self._offer(self.graph)
        self.floor_missed = False
        return True

    @property
    def _removable(self) -> tuple[Block, ...]:
        """Blocks that may still go: none where layers may lose only a part of their channels."""
        bounded = self.options.max_pruning_ratio is not None
        return () if bounded else depth.removable(self.graph)

    def _expendable(self) -> tuple[str, ...]:
        """Blocks to take out of the whole model."""
        problem = self._problem()
        losses = worth.of_blocks(self.shop, self.scores, self.worth)
        aimed = replace(problem, budget_ms=aim(problem.budget_ms, self._half_width()))

        def work() -> tuple[str, ...]:
            self.shop.say("choosing blocks to take out", self._next)
            return depth.choose(aimed, losses)

        return self.shop.run.journal.once("blocks to take out", tuple[str, ...], work)

    def _offer(self, graph: Graph) -> tuple[Choice, ...]:
        multiple, least = self.lessons.multiple, self.options.least
        return choices(graph, self.worth.curves, multiple=multiple, least=least)

    def _problem(self) -> Problem:
        assert self.model is not None
        params = self.options.max_params(self.shop.target.precision)
        caps = params, self.options.max_macs
        return Problem(self.graph, self.model, self.choices, self._limit(), *caps)

    def correct(self) -> None:
        """Allocate, build, measure and learn until the budget is met and filled."""
        while not self.done and self.builds_left > 0:
            if self.floor_missed and not self._shorten():
                break
            number = self._next
            self.model = self.lessons.fit()
            wanted = self._wanted(number)
            if wanted is None:
                break
            built = candidate.build(self.shop, number, "correction", self._plan(wanted.counts))
            attempt = self._measure(built, wanted.predicted_ms)
            self.attempts.append(attempt)
            self.curve = wanted.curve or self.curve
            self.ranked += wanted.ranked if wanted.ranked > 1 else 0
            self.floor_missed = wanted.floor and attempt.verdict != "met"
            self.lessons.keep()
        self.model = self.lessons.fit()
        self.notes += self.lessons.timings.notes
        if not self.done:
            self.notes += unfilled(self.attempts, self.builds_left, self.options.max_builds)
        if self.ranked:
            self.notes.append(
                f"{self.ranked} plans of nearly equal worth were compared by their loss on "
                f"{self.worth.samples} samples, without building them"
            )

    def _limit(self) -> float:
        """The budget for the median in baseline milliseconds, as of the last session."""
        if self.budget.latency_ms is None:
            assert self.budget.speedup is not None
            return self.baseline.p50_ms / self.budget.speedup
        if not self.attempts:
            tail = self.baseline.measured.latency
            value = percentile_ms(tail, self.budget.percentile)
            return self.budget.latency_ms * tail.p50_ms / value
        last = self.attempts[-1]
        seen = last.comparison
        speed = self.baseline.p50_ms / seen.reference.p50_ms
        return self.budget.latency_ms * speed * seen.candidate.p50_ms / last.value_ms

    def _wanted(self, number: int) -> Wanted | None:
        """The counts of build ``number``: from the journal, else allocated; None if all tried."""
        journal, key = self.shop.run.journal, f"{number:02d}-correction/wanted"
        if key not in journal:
            self.shop.say("planning", number)
            found = self._allocate()
            if found is None:
                return None
            journal.write(key, found)
        return journal.read(key, Wanted)

    def _allocate(self) -> Wanted | None:
        """The best plan that was not tried; ``None`` when there is no other worth a build."""
        problem, rank = self._problem(), self.rank
        return planning.propose(
            Question(
                problem,
                aim(problem.budget_ms, self._half_width()),
                self.lessons.tried,
                up=bool(self.attempts) and self.attempts[-1].verdict == "met",
                rank=rank and (lambda counts: rank(self._plan(counts))),
            )
        )

    def _half_width(self) -> float:
        """Half-width to expect of the next interval, as a fraction."""
        seen = expected_half_width(self.baseline, self.attempts, self.budget)
        return max(self.shop.target.measure.half_width, seen)

    def _measure(self, built: Built, predicted_ms: float) -> Attempt:
        """Profile a build and measure it interleaved with the baseline.

        Not only until the verdict is clear but until the interval of the ratio is narrow: the
        model learns from the value.
        """
        profile = candidate.profile(self.shop, built)

        def work() -> Comparison:
            self.shop.say("measuring", built.number)
            return measure.compare(
                self.shop.engine(built),
                self.shop.engine(self.baseline.built),
                self.shop.target,
                raw_path=self.shop.run / f"raw/{built.key}.npz",
                goal=self.goal,
            )

        seen = self.shop.run.journal.once(f"{built.key}/compare", Comparison, work)
        return Attempt(built, profile, seen, predicted_ms, self.budget, *judge(seen, self.budget))

    def recover(self) -> Outcome:
        """Get accuracy back on the best plan, and measure what is shipped.

        What misses the budget is kept for its user to judge, so its weights are fitted too;
        training, which may take hours, is left out.
        """
        found = best(self.attempts)
        shop, plan, lessons = self.shop, found.built.plan, self.lessons
        module = apply_plan(shop.module, shop.graph, plan, shop.example_inputs)
        trains = self.job.finetune is not None and found.verdict != "missed"
        if self.job.finetune is not None and not trains:
            self.notes.append("nothing was trained, since the budget is missed")
        if found.built.number and (trains or serves(self.job.batches, "bn")):
            module, found = self._recovered(module, found, trains=trains)
            self.attempts.append(found)
        return Outcome(
            self._verdict(found),
            module,
            found,
            self.baseline,
            tuple(self.attempts),
            tuple(lessons.probes),
            self.model,
            shop.graph,
            lessons.multiple,
            shop.target,
            found.value_ms if self._out_of_reach else None,
            tuple(self.notes),
            self.paid,
            self.curve,
            lessons.whole,
            lessons.multiple_source,
            self._gap(plan),
            accuracy.take(shop, self.baseline.built, found.built),
        )

    def _gap(self, plan: Plan) -> Gap | None:
        """How far the plan is from the best one of its predicted latency."""
        others = plan.kept and plan.removed == self.lessons.removed and not self.floor_missed
        if self.model is None or not others:
            return None
        self.shop.say("bounding what other widths could keep", self._next - 1)
        return optimality_gap(self._problem(), plan.counts)

    @property
    def _out_of_reach(self) -> bool:
        """Whether the smallest plan there is has missed, with no block left to take out."""
        return self.floor_missed and not self._removable

    def _verdict(self, found: Attempt) -> str:
        if found.verdict == "missed" and self._out_of_reach:
            return "unreachable"
        return found.verdict

    def _recovered(
        self, module: nn.Module, found: Attempt, *, trains: bool
    ) -> tuple[nn.Module, Attempt]:
        number, name = self._next, "weights.pt"
        key = f"{number:02d}-final/recovered"
        if key in self.shop.run.journal:
            state = torch.load(self.shop.run / name, weights_only=True)
            module.load_state_dict(state)
        else:
            shop = self.shop
            shop.say("recovering accuracy", number)
            plan = found.built.plan
            module, told = recovered(self.job, shop.graph, plan, module, trains=trains)
            with shop.run.place(name) as path:
                torch.save(module.state_dict(), path)
            shop.run.journal.write(key, Told(told))
        self.notes += self.shop.run.journal.read(key, Told).notes
        built = candidate.build_module(self.shop, number, found.built.plan, module.eval())
        return module, self._measure(built, found.predicted_ms)
