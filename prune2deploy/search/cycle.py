"""The one cycle of the product: (fit → allocate → build → measure)* until the budget is filled.

In: a job, its options, the workshop and the measured baseline. Out: a :class:`Search` that holds
every probe and every attempt, the latency model that they make, and why it ended. What was
measured goes back into the latency model, which allocates anew. Every finished step is in the
journal of the run directory, so a search that was stopped goes on without doing anything twice,
and one that is resumed with more builds repeats its decisions so far.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from prune2deploy.calibration import notices
from prune2deploy.config import RunOptions
from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Block, Graph
from prune2deploy.importance import score
from prune2deploy.measure import Goal
from prune2deploy.plan.allocate import (
    CapTooTightError,
    Curve,
    SmallestMisses,
    channels,
    over_caps,
    require_caps,
)
from prune2deploy.plan.choices import Choice, Problem, choices
from prune2deploy.plan.filling import NEAR
from prune2deploy.plan.latency_model import LatencyModel
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.search import candidate, depth, planning, worth
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.job import (
    Attempt,
    Baseline,
    Job,
    aim,
    best,
    expected_half_width,
    judge,
    percentile_ms,
    unfilled,
)
from prune2deploy.search.learning import COVERED, Lessons
from prune2deploy.search.planning import PlanRequest, Proposal


class Search:
    """The search of one run: what it has learnt so far, and what it builds next.

    Attributes:
        job: What it works on.
        options: What was asked for.
        budget: The latency to meet.
        goal: A deadline in milliseconds, as measurements judge it; ``None`` for a speed-up.
        shop: What every build shares.
        baseline: The unpruned model, measured.
        lessons: Every build so far, and the latency model that they make.
        floor_missed: Whether the smallest plan there is was measured, and misses the budget.
        notes: What a reader of the report should know.
        model: The latency model that the last plan came from; ``None`` before the first.
        curve: What other latencies were worth when it was chosen.
        ranked: How many plans of nearly equal worth were compared by their loss.
        scores: Axis name to one score per channel. It and those below are there after ``probe``.
        worth: What widths are worth.
        rank: The loss of a plan, at a build; ``None`` where losses do not decide.
        choices: The widths to choose from.
    """

    def __init__(self, job: Job, options: RunOptions, shop: Workshop, baseline: Baseline) -> None:
        self.job, self.options, self.shop, self.baseline = job, options, shop, baseline
        self.budget = options.budget
        deadline = self.budget.latency_ms
        self.goal = None if deadline is None else Goal(deadline, self.budget.percentile)
        self.lessons = Lessons(shop, baseline, cache=options.cache)
        self.floor_missed = self._shortest = self._spent = False
        self.notes = list(notices(job.batches))
        self.model: LatencyModel | None = None
        self.curve: Curve = ()
        self.ranked = 0

    def unpruned(self) -> None:
        """For a budget in milliseconds, see first whether the unpruned model meets it already."""
        limit = self.budget.latency_ms
        if limit is None or self.baseline.p50_ms > limit or not self._within_caps():
            return
        attempt = self.measure(self.baseline.built, self.baseline.p50_ms)
        if attempt.verdict == "met":
            self.attempts.append(attempt)
            self.notes.append("the model meets the budget as it is; nothing was pruned")

    def _within_caps(self) -> bool:
        """Whether the model as it is keeps the caps on size and multiply-accumulates."""
        return not over_caps(self.graph, {}, *self._caps)

    @property
    def _caps(self) -> tuple[int | None, int | None]:
        """Most parameters and multiply-accumulates."""
        return self.options.max_params(self.shop.target.precision), self.options.max_macs

    @property
    def graph(self) -> Graph:
        """The model, without the blocks that were taken out."""
        return self.lessons.graph

    @property
    def attempts(self) -> list[Attempt]:
        """Every measured candidate."""
        return self.lessons.attempts

    @property
    def standing(self) -> list[Attempt]:
        """The last attempt at every plan: its weights may have been recovered since the first."""
        return list({a.built.plan.to_json(): a for a in self.attempts}.values())

    @property
    def done(self) -> bool:
        """Whether an attempt meets and fills the budget, or the unpruned model meets it."""
        return any(a.filled or (a.verdict == "met" and a.built.number == 0) for a in self.standing)

    @property
    def builds_left(self) -> int:
        """Builds that the search may still use; a final model may need one at the end."""
        last = self.job.builds_again(self.shop.target.precision)
        return self.options.max_builds - int(last) - self.lessons.builds

    def probe(self) -> None:
        """Build and profile random aligned plans: the latency model is learnt from them."""
        lessons = self.lessons
        self.scores = score(self.options.importance, self.job.module, self.graph, self.job.batches)
        trains = self.job.finetune is not None
        kept = lessons.timings.losses
        self.worth = worth.find(self.shop, self.scores, lessons.multiple, kept, trains=trains)
        self.rank = worth.ranking(self.shop, self.scores, self.worth)
        self.choices = self._offer(self.graph)
        self._require_choices()
        least = self.graph.without([block.name for block in self._removable])
        require_caps(least, self.choices, *self._caps)
        self.notes += [note for note in (self.worth.note, lessons.recall()) if note]
        known = len({tuple(sorted(b.counts.items())) for b in lessons.recalled.builds})
        wanted = max(0, min(self.options.probes - known, self.builds_left - 1))
        wanted = wanted if self.baseline.profile else 0  # probes are profiled, not measured
        self._draw(self.shop.run.journal.once("probes wanted", int, lambda: wanted))
        lessons.keep()

    def _require_choices(self) -> None:
        """Raise ConfigError where the least widths leave every layer as it is."""
        if self.choices:
            return
        ratio, multiple = self.options.max_pruning_ratio, self.lessons.multiple
        found = f"found no layer that may become narrower in multiples of {multiple}"
        if ratio is not None:
            raise ConfigError(f"--max-pruning-ratio {ratio:g}: {found}; expected a larger fraction")
        raise ConfigError(f"{found}; expected a smaller channel_multiple in the target")

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
    def next(self) -> int:
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
        if not left or not self.builds_left:
            return False
        self.model = self.lessons.fit()
        names = [block.name for block in left] if self.lessons.removed else self._expendable()
        if not names:  # none of them saves time
            self._shortest = True
            return False
        self.lessons.take_out(names, self.model)
        self.choices = self._offer(self.graph)
        self.floor_missed = False
        return True

    @property
    def out_of_reach(self) -> bool:
        """Whether the smallest plan there is has missed, with no block left to take out."""
        return self.floor_missed and (self._shortest or not self._removable)

    @property
    def starved(self) -> bool:
        """Whether the search ended for want of builds."""
        return self._spent and not (self.done or self.out_of_reach)

    @property
    def _removable(self) -> tuple[Block, ...]:
        """Blocks that may still be taken out.

        None where ``max_pruning_ratio`` limits what a layer may lose, or where the runtime has no
        profile of single operators, so that the cost of a block is unknown.
        """
        stay = self.options.max_pruning_ratio is not None or not self.baseline.profile
        return () if stay else depth.removable(self.graph)

    def _expendable(self) -> tuple[str, ...]:
        """Blocks to take out of the whole model."""
        problem = self.problem()
        losses = worth.of_blocks(self.shop, self.scores, self.worth, self.next)
        aimed = replace(problem, budget_ms=aim(problem.budget_ms, self._half_width()))

        def work() -> tuple[str, ...]:
            self.shop.say("choosing blocks to take out", self.next)
            return depth.choose(aimed, losses)

        return self.shop.run.journal.once("blocks to take out", tuple[str, ...], work)

    def _offer(self, graph: Graph) -> tuple[Choice, ...]:
        multiple, least = self.lessons.multiple, self.options.least
        return choices(graph, self.worth.curves, multiple=multiple, least=least)

    def problem(self) -> Problem:
        """The present allocation problem, for the budget as it is."""
        assert self.model is not None
        return Problem(self.graph, self.model, self.choices, self._limit(), *self._caps)

    def best(self) -> Attempt:
        """The attempt to go on with, of those that lack the fewest blocks if any meets the budget.

        Plans are told apart by their loss where the run has data for it, else by what their widths
        are worth.
        """
        met = [a for a in self.standing if a.verdict == "met"]
        if len(met) < 2:
            return best(self.standing)
        fewest = min(len(a.built.plan.removed) for a in met)
        among = [a for a in met if len(a.built.plan.removed) == fewest]
        least, most = self.problem().ends
        return best(among, self._worth_of, 0.0 if self.rank else NEAR * (most - least))

    def _worth_of(self, plan: Plan) -> float:
        if self.rank is not None:
            return -self.rank(plan, self.next - 1)
        axes, counts = self.shop.graph.without(plan.removed).prunable, plan.counts
        return sum(float(self.worth.curves[a.name][counts.get(a.name, a.size)]) for a in axes)

    def correct(self) -> None:
        """Allocate, build, measure and learn until the budget is met and filled."""
        while not self.done and self.builds_left > 0:
            if self.floor_missed and not self._shorten():
                break
            number = self.next
            self.model = self.lessons.fit()
            try:
                proposal = self._proposal(number)
            except CapTooTightError:
                if not self._shorten():
                    raise
                continue
            except SmallestMisses:
                self.floor_missed = True
                continue
            if proposal is None:
                break
            built = candidate.build(self.shop, number, "correction", self._plan(proposal.counts))
            attempt = self.measure(built, proposal.predicted_ms)
            self.attempts.append(attempt)
            self.curve = proposal.curve or self.curve
            self.ranked += proposal.ranked if proposal.ranked > 1 else 0
            self.floor_missed = proposal.floor and attempt.verdict != "met"
            self.lessons.keep()
        self.model = self.lessons.fit()
        self._spent = self.builds_left <= 0

    def tell(self) -> None:
        """Note how the search went, once it is over."""
        self.notes += self.lessons.timings.notes
        if not (self.done or self.out_of_reach):
            self.notes += unfilled(self.best(), self.options, starved=self.starved)
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

    def _proposal(self, number: int) -> Proposal | None:
        """The counts of build ``number``: from the journal, else allocated; None if all tried."""

        def work() -> Proposal | None:
            self.shop.say("planning", number)
            return self._allocate()

        return self.shop.run.journal.maybe(f"{number:02d}-correction/wanted", Proposal, work)

    def _allocate(self) -> Proposal | None:
        """The best plan that was not tried; ``None`` when there is no other worth a build."""
        problem, rank, number = self.problem(), self.rank, self.next
        return planning.propose(
            PlanRequest(
                problem,
                aim(problem.budget_ms, self._half_width()),
                self.lessons.tried,
                up=any(attempt.verdict == "met" for attempt in self.standing),
                rank=rank and (lambda counts: rank(self._plan(counts), number)),
            )
        )

    def _half_width(self) -> float:
        """Half-width to expect of the next interval, as a fraction."""
        seen = expected_half_width(self.baseline, self.attempts, self.budget)
        return max(self.shop.target.measure.half_width, seen)

    def measure(self, built: Built, predicted_ms: float) -> Attempt:
        """Profile a build and measure it interleaved with the baseline.

        Not only until the verdict is clear but until the interval of the ratio is narrow: the
        model learns from the value.
        """
        profile = candidate.profile(self.shop, built)
        seen = candidate.compare(self.shop, built, self.baseline.built, self.goal)
        return Attempt(built, profile, seen, predicted_ms, self.budget, *judge(seen, self.budget))
