"""What accuracy the shipped file keeps, where the data of the run has class labels.

In: the unpruned build and the one that is shipped. Out: top-1 of both ONNX files on the same
samples: those that the run has held back, else some of those that it worked with, which flatter
what was fitted to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.lowering import top1


@dataclass(frozen=True)
class Accuracy:
    """Top-1 of two ONNX files.

    Attributes:
        samples: On how many samples.
        unseen: Whether those are samples that nothing was fitted to.
        unpruned: Fraction that the unpruned model gets right.
        pruned: Fraction that the final one gets right.
    """

    samples: int
    unpruned: float
    pruned: float
    unseen: bool = False


def take(shop: Workshop, before: Built, after: Built, unseen: Any = None) -> Accuracy | None:
    """Score both files; ``None`` without labels, or class scores of shape (batch, classes).

    Args:
        shop: Its data is used where none is held back.
        before: The unpruned model.
        after: The pruned one.
        unseen: Samples that were held back, or ``None``.
    """
    journal, key = shop.run.journal, f"{after.key}/accuracy"
    data = shop.batches if unseen is None else unseen
    if data is None:
        return None
    if key not in journal:
        shop.say("taking accuracy", after.number)
        first = top1(shop.run / before.onnx, data)
        second = first and top1(shop.run / after.onnx, data)
        if not first or not second:
            return None
        journal.write(key, Accuracy(first[1], first[0], second[0], unseen is not None))
    return journal.read(key, Accuracy)
