"""Accuracy comes back to the plan that was found: reconstruction, then training where wanted.

In: a job, a pruned module and its plan. Out: the module with other weights, and what the report
says of it. The built-in training has to prove itself on samples that were held back; a caller's own
is taken as it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from prune2deploy.calibration import serves
from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Graph
from prune2deploy.plan.plan import Plan
from prune2deploy.recover.judging import judged
from prune2deploy.recover.reconstruct import restore
from prune2deploy.search.job import Finetune, Job
from prune2deploy.surgery.copying import copied


@dataclass(frozen=True)
class Told:
    """Notes on what was done, as the journal keeps them."""

    notes: tuple[str, ...]


def recovered(
    job: Job, graph: Graph, plan: Plan, module: nn.Module, *, trains: bool
) -> tuple[nn.Module, tuple[str, ...]]:
    """Get accuracy back.

    Args:
        job: Its data and its training.
        graph: Of the unpruned model.
        plan: What was pruned.
        module: The pruned module, which is changed in place.
        trains: Whether training is worth its time.

    Returns:
        The module, or another one of the same shapes, and notes for the report.

    Raises:
        ConfigError: The training gives back something else.
    """
    told: list[str] = []
    train = job.finetune if trains else None
    if serves(job.batches, "bn"):
        told.append(restore(module, job.module, graph, plan, job.batches))
    if train is None:
        return module, tuple(told)
    if job.unseen is None:
        return finetuned(module, train), tuple(told)
    before = copied(module, {})
    after = finetuned(module, train)
    found = judged(before, after, job.module, job.unseen)
    return after if found.better else before, (*told, found.text())


def finetuned(module: nn.Module, train: Finetune) -> nn.Module:
    """Train a pruned module by the user's function; what comes back must have the same shapes.

    Raises:
        ConfigError: It gives back something else.
    """
    before = _shapes(module)
    returned: Any = train(module)
    after = module if returned is None else returned
    if not isinstance(after, nn.Module):
        raise ConfigError(
            f"finetune: it returned a {type(after).__name__}, expected None (trained in place) or "
            "a module"
        )
    found = _shapes(after)
    for name in sorted({*before, *found}):
        if before.get(name) != found.get(name):
            raise ConfigError(
                f"finetune: {name} has shape {found.get(name)} afterwards, expected "
                f"{before.get(name)} as in the module that it was given: train that one, or "
                "return one of the same layers and widths"
            )
    return after


def _shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in module.state_dict().items()}
