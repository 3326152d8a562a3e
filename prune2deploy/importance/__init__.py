"""Importance: which channels of each axis matter most.

In: a model, its graph and, for some criteria, data. Out: one score per channel of every prunable
axis. ``CRITERIA`` is the only table of names; what is not in it is refused.

    scores = score("l2", model, graph)
    scores = score("taylor", model, graph, batches)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import nn

from prune2deploy import config
from prune2deploy.calibration import Batch, require
from prune2deploy.errors import ConfigError, ModelError
from prune2deploy.graph.axes import Graph
from prune2deploy.importance import data, weights
from prune2deploy.importance.members import Scores, Subject

__all__ = ["CRITERIA", "NAMES", "Criterion", "check", "require_data", "score"]


@dataclass(frozen=True)
class Criterion:
    """A named way to score channels.

    Attributes:
        function: ``(subject, batches, seed) -> scores``.
        needs_data: Whether it must be given batches.
    """

    function: Callable[[Subject, Iterable[Batch], int], Scores]
    needs_data: bool


def _free(function: Callable[[Subject], Scores]) -> Criterion:
    return Criterion(lambda subject, batches, seed: function(subject), False)


def _data(function: Callable[[Subject, Iterable[Batch]], Scores]) -> Criterion:
    return Criterion(lambda subject, batches, seed: function(subject, batches), True)


CRITERIA: dict[str, Criterion] = {
    "l1": _free(weights.l1),
    "l2": _free(weights.l2),
    "group_norm": _free(weights.group_norm),
    "bn_scale": _free(weights.bn_scale),
    "fpgm": _free(weights.fpgm),
    "lamp": _free(weights.lamp),
    "taylor": _data(data.taylor),
    "fisher": _data(data.fisher),
    "hessian": _data(data.hessian),
    "activation": _data(data.activation),
    "random": Criterion(lambda subject, batches, seed: weights.random(subject, seed), False),
}
"""Name → criterion."""

NAMES: tuple[str, ...] = tuple(CRITERIA)
DATA_FREE: tuple[str, ...] = tuple(n for n, known in CRITERIA.items() if not known.needs_data)
"""Those that need no data."""


def score(
    name: str,
    model: nn.Module,
    graph: Graph,
    batches: Iterable[Batch] | None = None,
    *,
    seed: int = 0,
) -> Scores:
    """Score every channel of every prunable axis.

    Args:
        name: One of ``NAMES``.
        model: The module that ``graph`` was traced from; left as it was.
        graph: Its graph.
        batches: ``(inputs, labels)`` pairs, inputs a tuple of tensors, labels a tensor or None;
            needed by the criteria that look at data.
        seed: For ``random`` alone.

    Returns:
        Axis name → shape (size,), float32 on the CPU; higher means keep. How axes compare with
        each other is said in each criterion's docstring.

    Raises:
        ConfigError: the name is unknown, data is missing, or the model is not the graph's.
        ModelError: scores are NaN or infinite, because weights or what the data gives are.
    """
    check(name, batches)
    criterion = CRITERIA[name]
    subject = Subject(model, graph)
    found = criterion.function(subject, () if batches is None else batches, seed)
    _require_finite(name, subject, found)
    return found


def check(name: str, batches: Iterable[Batch] | None) -> None:
    """Raise ConfigError where a criterion is unknown, or lacks data that it may look at."""
    if CRITERIA[config.one_of("importance", name, NAMES)].needs_data:
        require_data(name, given=batches is not None)
        require(batches, "importance")


def _require_finite(name: str, subject: Subject, scores: Scores) -> None:
    """Raise ModelError where scores do not tell channels apart, and say what they come from."""
    odd = [axis for axis, values in scores.items() if not torch.isfinite(values).all()]
    if not odd:
        return
    members = [pair for axis in odd for pair in subject.counted(subject.graph[axis])]
    spoilt = sorted({m.tensor for m, tensor in members if not torch.isfinite(tensor).all()})
    cause = (
        f"{', '.join(spoilt[:3])}{' and others' * (len(spoilt) > 3)} hold NaN or infinite numbers; "
        "load weights that are finite"
        if spoilt
        else "the weights are finite, but not what they add up to or what the data gives; check "
        f"the range of both, or choose another criterion: {', '.join(NAMES)}"
    )
    raise ModelError(
        f"importance {name!r}: scores of {len(odd)} of {len(scores)} axes are not finite: {cause}"
    )


def require_data(name: str, *, given: bool) -> None:
    """Raise ConfigError where a criterion that looks at data is given none."""
    if not given:
        raise ConfigError(
            f"importance {name!r} looks at data and was given none: add --data RECIPE, or choose a "
            f"criterion that needs no data: {', '.join(DATA_FREE)}"
        )
