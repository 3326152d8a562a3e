"""Restores the accuracy of the pruned model: reconstruction, then training where wanted.

In: a job, a pruned module and its plan. Out: the module with other weights, and what the report
says of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from prune2deploy.calibration import serves
from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.calling import device_of, state_tensors
from prune2deploy.plan.plan import Plan
from prune2deploy.recover import Finetuned, Training
from prune2deploy.recover.reconstruct import restore
from prune2deploy.search.job import Finetune, Job


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
        trained = train is not None and not _short(train)
        told.append(restore(module, job.module, graph, plan, job.batches, trained=trained))
    if train is not None:
        module, note = finetuned(module, train)
        told += [note] if note else []
    return module, tuple(told)


def _short(train: Finetune) -> bool:
    """Whether the training is too short to move far from where it starts."""
    return isinstance(train, Training) and not train.settles


def finetuned(module: nn.Module, train: Finetune) -> tuple[nn.Module, str]:
    """Train a pruned module by a function; what comes back must have the same shapes and types.

    Returns:
        The trained module, on the device that it was on, and what the built-in training says of it.

    Raises:
        ConfigError: It gives back something else.
    """
    before, device = _forms(module), device_of(module)
    returned: Any = train(module)
    note, after = "", module if returned is None else returned
    if isinstance(returned, Finetuned):
        note, after = returned.text(), returned.module
    if not isinstance(after, nn.Module):
        raise ConfigError(
            f"finetune: it returned a {type(after).__name__}, expected None (trained in place) or "
            "a module"
        )
    found = _forms(after)
    for name in sorted({*before, *found}):
        if before.get(name) != found.get(name):
            raise ConfigError(
                f"finetune: {name} has shape {found.get(name)} afterwards, expected "
                f"{before.get(name)} as in the module that it was given: train that one, or "
                "return one of the same layers, widths and types"
            )
    return after.to(device), note


def _forms(module: nn.Module) -> dict[str, str]:
    held = state_tensors(module).items()
    return {name: f"{tuple(one.shape)} in {one.dtype}" for name, one in held}
