"""Top-1 accuracy before and after, where the data of the run has class labels.

In: the unpruned build and the one that is shipped. Out: top-1 of both ONNX files on the same
samples. These are samples of the run's own data: where the run trains on them, they flatter it.
"""

from __future__ import annotations

from dataclasses import dataclass

from prune2deploy.calibration import serves
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.lowering import top1


@dataclass(frozen=True)
class Top1:
    """Top-1 of two ONNX files.

    Attributes:
        samples: On how many samples of the run's data.
        unpruned: Fraction that the unpruned model gets right.
        pruned: Fraction that the final one gets right.
    """

    samples: int
    unpruned: float
    pruned: float


def take(shop: Workshop, before: Built, after: Built) -> Top1 | None:
    """Score both files.

    Returns:
        ``None`` without data for ``evaluate``, labels, or class scores of shape (batch, classes).
    """
    data = shop.batches
    if not serves(data, "evaluate"):
        return None

    def work() -> Top1 | None:
        shop.say("taking accuracy", after.number)
        first = top1(shop.run / before.onnx, data)
        second = first and top1(shop.run / after.onnx, data)
        return Top1(first[1], first[0], second[0]) if first and second else None

    return shop.run.journal.maybe(f"{after.key}/accuracy", Top1, work)
