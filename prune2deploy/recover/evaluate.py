"""How accurate a classifier is on labelled batches.

In: a module and batches with labels. Out: :class:`Accuracy`, with the interval that the number of
samples allows. Source of the interval: Wilson, J. Am. Stat. Assoc. 22 (1927), 209-212.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prune2deploy.calibration import IGNORED, Batch, read
from prune2deploy.errors import ConfigError
from prune2deploy.graph.calling import device_of
from prune2deploy.modes import evaluating

_Z95 = 1.959964  # of the normal distribution, for 95 per cent


@dataclass(frozen=True)
class Accuracy:
    """Top-1 accuracy.

    Attributes:
        top1: Fraction of samples whose largest output is the label, in 0..1.
        ci95: Wilson interval of ``top1``.
        loss: Mean cross-entropy, in nats.
        samples: Samples seen.
    """

    top1: float
    ci95: tuple[float, float]
    loss: float
    samples: int


def logits_of(outputs: object) -> Tensor:
    """Return the class scores, (batch, classes), of what a classifier returned.

    A tensor is taken as it is; of a tuple or a dictionary the first tensor is taken.

    Raises:
        ConfigError: It is not of two dimensions.
    """
    if isinstance(outputs, dict):
        outputs = tuple(outputs.values())
    if isinstance(outputs, (tuple, list)):
        outputs = next((one for one in outputs if isinstance(one, Tensor)), None)
    if isinstance(outputs, Tensor) and outputs.ndim == 2:
        return outputs
    found = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
    raise ConfigError(
        f"the model returns {found}; accuracy and the built-in training need class scores of "
        "shape (batch, classes); give a training function of your own (docs/training.md)"
    )


def numbers(labels: Tensor) -> Tensor:
    """Return labels of whole numbers as int64, which torch's losses want; others as they are."""
    return labels if labels.is_floating_point() else labels.long()


def require_labels(labels: Tensor, scores: Tensor, *, soft: bool) -> None:
    """Check that there is a label for each sample, one of the classes or ``IGNORED``.

    Args:
        labels: Whole numbers, (batch,); or shares of the classes, (batch, classes).
        scores: Class scores, (batch, classes).
        soft: Whether shares will do.

    Raises:
        ConfigError: They are of another shape, or one is none of the classes.
    """
    shares = soft and labels.is_floating_point()
    wanted = tuple(scores.shape if shares else scores.shape[:1])
    if tuple(labels.shape) != wanted:
        raise ConfigError(
            f"labels: found shape {tuple(labels.shape)} ({labels.dtype}) for class scores of shape "
            f"{tuple(scores.shape)}, expected {wanted}, one whole number per sample"
            + ", or floating-point shares of the classes"
            * soft
        )
    classes = scores.shape[1]
    wrong = labels[((labels < 0) | (labels >= classes)) & (labels != IGNORED)]
    if not shares and len(wrong):
        raise ConfigError(
            f"found label {int(wrong[0])}, expected 0 to {classes - 1}, since the model gives "
            f"scores for {classes} classes; correct the data, or take the model that it is for"
        )


def evaluate(module: nn.Module, batches: Iterable[Batch]) -> Accuracy:
    """Measure top-1 accuracy in eval mode; the module's mode is as before afterwards.

    Args:
        module: Takes the batches' inputs, on its own device; returns (batch, classes).
        batches: (inputs, labels), a DataLoader or a list, with labels of shape (batch,); those
            of -100 are left out.

    Raises:
        ConfigError: There is no labelled sample, labels are not one per sample or none of the
            classes, or the output is not that of a classifier.
    """
    device = device_of(module)
    right, loss, samples = 0, 0.0, 0
    with evaluating(module), torch.no_grad():
        for inputs, labels in read(batches):
            if labels is None:
                raise ConfigError(
                    "accuracy needs labels, but the data has none; use a recipe with labels"
                )
            target = numbers(labels.to(device))
            logits = logits_of(module(*(one.to(device) for one in inputs))).float()
            require_labels(target, logits, soft=False)
            logits, target = logits[target != IGNORED], target[target != IGNORED]
            right += int((logits.argmax(1) == target).sum())
            loss += float(nn.functional.cross_entropy(logits, target, reduction="sum"))
            samples += len(target)
    if samples == 0:
        raise ConfigError("accuracy needs at least one labelled sample; the data has none")
    return Accuracy(right / samples, wilson(right, samples), loss / samples, samples)


def wilson(right: int, samples: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a proportion.

    >>> low, high = wilson(90, 100)
    >>> round(low, 3), round(high, 3)
    (0.826, 0.945)
    """
    share = right / samples
    scale = 1 + _Z95**2 / samples
    centre = (share + _Z95**2 / (2 * samples)) / scale
    half = _Z95 / scale * math.sqrt(share * (1 - share) / samples + _Z95**2 / (4 * samples**2))
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))
