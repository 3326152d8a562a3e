"""The main path: from a model and a budget to a smaller model that was measured to meet it.

    open → baseline → probes → (fit → allocate → build → measure)* → recover → outcome

In: a :class:`~prune2deploy.search.job.Job`. Out: an
:class:`~prune2deploy.search.job.Outcome`. The cycle in the middle is ``search.cycle``.
Every finished step is in the journal of the run directory, so a run that was stopped goes on
without doing anything twice.

Latencies inside the search are in *baseline milliseconds*: a candidate's measured ratio to the
baseline times the baseline's first measured median. Machines change speed between two
measurements; the ratio, taken from interleaved runs, does not.

Widths decide latency and weights do not, so the search works on models as pruned; accuracy is
recovered once, on the plan that was found, and the recovered model is built and measured again.
So is one in int8, whose ranges come from a few samples until then.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn
from torch.fx import GraphModule

from prune2deploy.calibration import serves
from prune2deploy.config import RunOptions
from prune2deploy.errors import ConfigError
from prune2deploy.importance import check as check_importance
from prune2deploy.plan.allocate import Gap, optimality_gap
from prune2deploy.plan.plan import Plan
from prune2deploy.rundir import WORK, RunDir
from prune2deploy.search import accuracy, candidate, payoff, saving
from prune2deploy.search.candidate import Built
from prune2deploy.search.cycle import Search
from prune2deploy.search.job import Attempt, Job, Outcome, best, bounded
from prune2deploy.search.opening import measure_baseline, open_workshop
from prune2deploy.search.payoff import Payoff
from prune2deploy.search.recovery import Told, recovered
from prune2deploy.surgery.slicing import apply as apply_plan


def prune_to_budget(job: Job, options: RunOptions) -> Outcome:
    """Prune until the measured latency meets the budget, or say that it cannot be met.

    Raises:
        ConfigError: Too few builds are allowed for a search and a final model, or no layer may
            become narrower.
        TraceError: The model does not run or has nothing to prune.
        MissingBackend: The target is not usable here.
        PlanError: A cap on size or multiply-accumulates cannot be kept.
        ParityError: A build gives other outputs than the pruned module.
        BackendError: A build failed.
        MeasureError: A measurement failed.
    """
    wanted = options.model.precision or job.target.precision
    if options.max_builds < 2 and job.builds_again(wanted):
        raise ConfigError(
            f"--max-builds {options.max_builds}: found data, training or int8, for which the final "
            "model is built once more, expected at least 2"
        )
    check_importance(options.importance, job.batches)
    shop = open_workshop(job, options.model, options.max_builds, options.max_drop)
    shop, paid = payoff.settle(shop, asked=options.model.precision is not None)
    baseline = measure_baseline(shop)
    most = _allowed(job.run, options.max_builds)
    shop = replace(shop, total=most)
    search = Search(job, replace(options, max_builds=most), shop, baseline)
    if most > options.max_builds:
        search.notes.append(
            f"--max-builds {options.max_builds} came too late: the run had been allowed {most}"
        )
    search.unpruned()
    if not search.done:
        search.probe()
        search.correct()
    module, found = _shipped(search)
    search.notes += _class_kept(job.module, module, asked=options.model.keep_class)
    return _outcome(search, module, found, paid)


def _class_kept(before: nn.Module, after: nn.Module, *, asked: bool) -> tuple[str, ...]:
    """What to tell where a module could not stay of its class."""
    if isinstance(before, GraphModule) or not isinstance(after, GraphModule):
        return ()
    advice = (
        "what went agrees with the model's code one by one, but not together; name some of the "
        "layers with --keep LAYER"
        if asked
        else "the model's code holds some of its widths, which --keep-class leaves alone"
    )
    return (f"the pruned module is a captured graph, not a {type(before).__name__}: {advice}",)


def _allowed(run: RunDir, asked: int) -> int:
    """The most builds that a session of this run was allowed: a later one cannot undo them."""
    key = "builds allowed"
    before = run.journal.read(key, int) if key in run.journal else 0
    if asked > before:
        run.journal.write(key, asked)
    return max(asked, before)


def _shipped(search: Search) -> tuple[nn.Module, Attempt]:
    """The model that is shipped and its measurement: the best plan with its accuracy back.

    Recovered weights are measured anew. Where the budget is not met after all, the search goes on
    while there are builds, unless the model was trained, which may take hours. A model that misses
    the budget is shipped too, for its user to judge: its weights are fitted, but it is not trained.
    """
    shop, options = search.shop, search.options
    made: dict[int, tuple[nn.Module, Attempt]] = {}
    while (chosen := search.best()).built.number not in made:
        module, final, trained = _finished(search, chosen)
        made[final.built.number] = module, final
        spent = search.lessons.builds >= options.max_builds
        if final is chosen or final.verdict == "met" or trained or spent:
            break
        search.correct()
    module, final = made[best([final for _, final in made.values()]).built.number]
    if final.built.step == "final" and not (shop.run / _weights(final.built.number)).exists():
        # the run is finished, and of all recovered weights the shipped ones are left
        module.load_state_dict(torch.load(shop.run / "weights.pt", weights_only=True))
    if search.job.finetune is not None and chosen.verdict == "missed":
        search.notes.append("nothing was trained, since the budget is missed")
    search.tell()
    return module, final


def _finished(search: Search, chosen: Attempt) -> tuple[nn.Module, Attempt, bool]:
    """The model of an attempt, with its accuracy back if that is wanted; and if it was trained.

    The attempt is a new one where the weights are, or where its file was made for timing only.
    """
    job, shop = search.job, search.shop
    module = apply_plan(shop.module, shop.graph, chosen.built.plan, shop.example_inputs)
    trains = job.finetune is not None and chosen.verdict != "missed"
    quick = chosen.built.lowered is not None and chosen.built.lowered.quick
    if not chosen.built.number or not (trains or quick or serves(job.batches, "bn")):
        return module, chosen, False
    module, final = _recovered(search, module, chosen, trains=trains)
    search.attempts.append(final)
    return module, final, trains


def _weights(number: int) -> str:
    """Where the recovered weights of a build are kept while the run goes on."""
    return f"{WORK}/{number:02d}-final/weights.pt"


def _outcome(search: Search, module: nn.Module, found: Attempt, paid: Payoff | None) -> Outcome:
    """What the run ends with."""
    shop, lessons, plan = search.shop, search.lessons, found.built.plan
    unreachable = found.verdict == "missed" and search.out_of_reach
    if unreachable:
        search.notes += bounded(search.options)
    return Outcome(
        verdict="unreachable" if unreachable else found.verdict,
        module=module,
        final=found,
        baseline=search.baseline,
        attempts=tuple(search.attempts),
        probes=tuple(lessons.probes),
        model=search.model,
        graph=shop.graph,
        multiple=lessons.multiple,
        multiple_source=lessons.multiple_source,
        target=shop.target,
        floor_ms=found.value_ms if search.out_of_reach else None,
        notes=tuple(search.notes),
        paid=paid,
        curve=search.curve,
        whole=lessons.whole,
        gap=_gap(search, plan),
        accuracy=accuracy.take(shop, search.baseline.built, found.built),
        starved=search.starved,
        superseded=_superseded(search),
    )


def _superseded(search: Search) -> tuple[Built, ...]:
    """Final builds of earlier sessions of the run, which were allowed fewer builds."""
    journal = search.shop.run.journal
    finals = [journal.read(k, Built) for k in journal.keys if k.endswith("-final/build")]
    return tuple(one for one in finals if all(one.key != a.built.key for a in search.attempts))


def _recovered(
    search: Search, module: nn.Module, found: Attempt, *, trains: bool
) -> tuple[nn.Module, Attempt]:
    """The module with its accuracy back, and its measurement; from the journal if it was done."""
    shop, number, plan = search.shop, search.next, found.built.plan
    key, name = f"{number:02d}-final/recovered", _weights(number)
    if key in shop.run.journal:
        if (kept := shop.run / name).exists():
            module.load_state_dict(torch.load(kept, weights_only=True))
    else:
        shop.say("recovering accuracy", number)
        module, told = recovered(search.job, shop.graph, plan, module, trains=trains)
        saving.save_weights(shop.run, module, name)
        shop.run.journal.write(key, Told(told))
    search.notes += shop.run.journal.read(key, Told).notes
    built = candidate.build_module(shop, number, plan, module.eval())
    return module, search.measure(built, found.predicted_ms)


def _gap(search: Search, plan: Plan) -> Gap | None:
    """A bound on what other widths of the plan's predicted latency could keep beyond it."""
    others = plan.kept and plan.removed == search.lessons.removed and not search.floor_missed
    if search.model is None or not others:
        return None
    search.shop.say("bounding what other widths could keep", search.next - 1)
    return optimality_gap(search.problem(), plan.counts)
