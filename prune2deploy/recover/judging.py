"""Whether training helped: a module before and after it, on samples that it was not trained on.

In: batches; then both modules and the unpruned one. Out: batches to train on and batches to judge
by; then :class:`Judgement`. A short training, or one on few samples, can lose more than it brings
where reconstruction has given most of the accuracy back already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from prune2deploy.calibration import Batch, Batches
from prune2deploy.graph.calling import device_of
from prune2deploy.modes import evaluating
from prune2deploy.recover.evaluate import Accuracy, evaluate, logits_of

ONE_IN = 8  # samples is held back
MOST = 512  # at most
LEAST = 16  # fewer can tell nothing, and none is held back


@dataclass(frozen=True)
class Judgement:
    """A module before and after its training.

    Attributes:
        before: Its accuracy before.
        after: And after.
        labelled: Whether right is what the labels say; else what the unpruned model says.
    """

    before: Accuracy
    after: Accuracy
    labelled: bool

    @property
    def better(self) -> bool:
        """Whether the trained module is right more often, or as often and surer of it."""
        ranks = [(one.top1, -one.loss) for one in (self.before, self.after)]
        return ranks[1] > ranks[0]

    def text(self) -> str:
        """One line for the report."""
        told = f"{self.before.top1:.1%} before, {self.after.top1:.1%} after"
        what = "top-1" if self.labelled else "agreement with the unpruned model"
        where = f"{what} on {self.before.samples} samples held back from it: {told}"
        if self.better:
            return f"trained; {where}"
        return f"what training gave was dropped, since it is no better; {where}"


def parted(batches: Batches) -> tuple[Batches, Batches | None]:
    """Part batches into those to train on and those to judge by.

    Returns:
        All of them and ``None`` where there are too few samples to hold any back.
    """
    count = min(batches.count // ONE_IN, MOST)
    if count < LEAST:
        return batches, None
    judging, training = batches.parted(count)
    return training, judging


def judged(
    before: nn.Module, after: nn.Module, unpruned: nn.Module, batches: Iterable[Batch]
) -> Judgement:
    """Compare a classifier before and after training.

    Args:
        before: The pruned module.
        after: The same, trained.
        unpruned: Gives the answers where there are no labels.
        batches: (inputs, labels or ``None``) that neither of the first two has seen; gone through
            twice.

    Raises:
        ConfigError: There is no sample, or a module does not return class scores.
    """
    labelled = all(labels is not None for _, labels in batches)
    data = batches if labelled else _Answered(unpruned, batches)
    return Judgement(evaluate(before, data), evaluate(after, data), labelled)


@dataclass(frozen=True, eq=False)
class _Answered:
    """Batches whose labels are the answers of a module."""

    module: nn.Module
    batches: Iterable[Batch]

    def __iter__(self) -> Iterator[Batch]:
        device = device_of(self.module)
        for inputs, _ in self.batches:
            with evaluating(self.module), torch.no_grad():
                scores = logits_of(self.module(*(one.to(device) for one in inputs)))
            yield inputs, scores.argmax(1).cpu()
