"""fp32 ONNX file → the file that is built, in the precision of the run.

In: a simplified fp32 file and :class:`Wish`. Out: the file, and :class:`Lowered`, which says what
it took: nodes that stayed in higher precision, agreement with the fp32 file, accuracy where there
are labels. Nothing is raised for outputs that differ too much: whether that matters depends on what
the file is for, which ``passed`` lets the caller decide.

The search needs latency only, and latency does not depend on the values of scales. So its int8
files take their ranges from a few samples and keep those nodes in fp32 that the unpruned model
keeps; the file that is shipped is calibrated on all samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from prune2deploy.atomic import scratch
from prune2deploy.backends import onnx_file
from prune2deploy.calibration import (
    Batch,
    Batches,
    Preprocessing,
    check_labels,
    first,
    notices,
    open_recipe,
)
from prune2deploy.errors import ConfigError, ParityError
from prune2deploy.exporting import parity, precision
from prune2deploy.exporting.keeping import Accuracy
from prune2deploy.exporting.parity import Parity
from prune2deploy.exporting.precision import Int8Options, PrecisionReport
from prune2deploy.exporting.ranges import feeds
from prune2deploy.progress import Progress, tell

QUICK_SAMPLES = 8  # that int8 ranges come from while only latency matters
SCORED_SAMPLES = 512  # at most, that the accuracy of a file is taken on


@dataclass(frozen=True, eq=False)
class Wish:
    """What a file is to become.

    Attributes:
        precision: ``fp16`` or ``int8``.
        recipe: Form of int8 graph that the runtime wants; see ``quantize``.
        batches: Calibration data; needed for int8.
        keep: Nodes that stay in higher precision in any case.
        quick: Whether only its latency matters.
        max_drop: Largest top-1 accuracy to lose to the precision, as a fraction; without it the
            outputs' difference decides.
        store: File that keeps the int8 ranges, or ``None``.
        samples: Inputs to judge fp16 by where there is no data; random ones unless told.
    """

    precision: str
    recipe: str = "tensorrt"
    batches: Iterable[Batch] | None = None
    keep: tuple[str, ...] = ()
    quick: bool = False
    max_drop: float | None = None
    store: Path | None = None
    samples: Sequence[Mapping[str, parity.Array]] | None = None


@dataclass(frozen=True)
class Lowered:
    """How a file came to its precision.

    Attributes:
        precision: ``fp16`` or ``int8``.
        kept: Names of the nodes that stayed in higher precision.
        parity: Its outputs against those of the fp32 file; ``passed`` tells which limit decided.
        passed: Whether it is close enough to the fp32 file to be shipped.
        quick: Whether it was made for timing only.
        samples: Rows of data that the int8 ranges come from; 0 for fp16.
        top1_fp32: Accuracy of the fp32 file, where there are labels.
        top1: Accuracy of this file.
        scored: Samples that both were taken on.
    """

    precision: str
    kept: tuple[str, ...]
    parity: Parity
    passed: bool
    quick: bool
    samples: int
    top1_fp32: float | None = None
    top1: float | None = None
    scored: int = 0

    def text(self) -> str:
        """One line for the report."""
        said = [f"{self.precision}: outputs differ from fp32 by {self.parity.error:.3g} of scale"]
        if self.kept:
            said.append(f"{len(self.kept)} operators stayed in higher precision")
        if self.samples:
            said.append(f"ranges from {self.samples} samples")
        if self.top1 is not None and self.top1_fp32 is not None:
            said.append(
                f"top-1 {self.top1:.2%} against {self.top1_fp32:.2%} in fp32 on {self.scored} "
                "calibration samples"
            )
        return "; ".join(said)


def require(made: Lowered, max_drop: float | None) -> None:
    """Raise ParityError where a file loses more accuracy than it may.

    Args:
        made: The file that may be shipped.
        max_drop: Largest top-1 accuracy to lose, or ``None`` where accuracy does not decide.
    """
    if max_drop is None or made.passed or made.quick or None in (made.top1, made.top1_fp32):
        return
    assert made.top1 is not None and made.top1_fp32 is not None
    raise ParityError(
        f"{made.precision} costs {made.top1_fp32 - made.top1:.2%} of top-1 accuracy "
        f"({made.top1:.2%} against {made.top1_fp32:.2%} in fp32 on {made.scored} samples), "
        f"--max-drop allows {max_drop:.2%}; {len(made.kept)} operators stayed in higher precision "
        "already. Allow more, calibrate on more samples, or use a higher precision"
    )


def lower(path: Path, out: Path, wish: Wish) -> Lowered:
    """Write ``path`` in the wanted precision to ``out``.

    Raises:
        ConfigError: int8 without data, or accuracy is to decide and there are no class labels.
        ExportError: The model cannot be converted.
    """
    if wish.precision == "fp16":
        tolerance = math.inf if wish.quick else None
        samples = wish.samples
        if wish.batches is not None:
            samples = list(feeds(path, first(wish.batches, QUICK_SAMPLES)))
        report = precision.to_fp16(
            path,
            out,
            samples=samples,
            keep=wish.keep,
            tolerance=tolerance,
            accuracy=_accuracy(path, wish),
        )
        return _described(path, report, wish)
    if wish.batches is None:
        raise ConfigError("precision int8 needs calibration data: add --data RECIPE")
    batches = first(wish.batches, QUICK_SAMPLES) if wish.quick else wish.batches
    report = precision.to_int8(path, out, batches, _int8_options(path, wish))
    return _described(path, report, wish)


def _int8_options(path: Path, wish: Wish) -> Int8Options:
    base = Int8Options(recipe=wish.recipe, keep=wish.keep)
    if wish.quick:
        return replace(base, max_error=math.inf)
    data = wish.batches.sha256 if isinstance(wish.batches, Batches) else ""
    return replace(base, data=data, store=wish.store, accuracy=_accuracy(path, wish))


def _accuracy(path: Path, wish: Wish) -> Accuracy | None:
    """What decides where accuracy is to; ``None`` where the outputs' difference is."""
    if wish.max_drop is None or wish.quick:
        return None
    if wish.batches is None or top1(path, first(wish.batches, QUICK_SAMPLES)) is None:
        raise ConfigError(
            "--max-drop: found no class labels in the data, or a model that gives no class scores "
            "of shape (batch, classes); leave it out, and the difference of the outputs decides"
        )
    return Accuracy(_evaluate(wish.batches), wish.max_drop)


def _evaluate(batches: Iterable[Batch]) -> Callable[[Path], float]:
    def accuracy(path: Path) -> float:
        found = top1(path, batches)
        assert found is not None
        return found[0]

    return accuracy


def _described(path: Path, report: PrecisionReport, wish: Wish) -> Lowered:
    plain = None if wish.quick or wish.batches is None else top1(path, wish.batches)
    own = None if plain is None or wish.batches is None else top1(report.path, wish.batches)
    limit = parity.TOLERANCE[wish.precision] if wish.quick else report.parity.tolerance
    passed = report.parity.error <= limit if wish.quick else report.passed
    return Lowered(
        precision=report.precision,
        kept=report.kept,
        parity=replace(report.parity, tolerance=limit, passed=passed),
        passed=passed,
        quick=wish.quick,
        samples=report.samples,
        top1_fp32=plain[0] if plain else None,
        top1=own[0] if own else None,
        scored=own[1] if own else 0,
    )


def top1(
    path: Path, batches: Iterable[Batch], limit: int = SCORED_SAMPLES
) -> tuple[float, int] | None:
    """Top-1 accuracy of an ONNX file and the samples it was taken on.

    Returns:
        ``None`` where the data has no class labels, none that fit, or the first output is not
        (batch, classes).
    """
    inputs, outputs = onnx_file.signature(path)
    if len(outputs[0].shape) != 2:
        return None
    run = parity.onnx_runner(path)
    labels: list[int] = []
    right = seen = 0
    for feed in feeds(path, _labelled(batches, limit, labels)):
        scores = run(feed)[outputs[0].name]
        wanted = np.array(labels[seen : seen + len(feed[inputs[0].name])])
        if wanted.max() >= scores.shape[1]:
            return None
        right += int((scores[: len(wanted)].argmax(1) == wanted).sum())
        seen += len(wanted)
    return (right / seen, seen) if seen else None


def _labelled(batches: Iterable[Batch], limit: int, labels: list[int]) -> Iterator[Batch]:
    """Give batches as long as there are labels, and add those to ``labels``; up to a limit."""
    for batch in batches:
        if batch[1] is None or batch[1].ndim != 1 or len(labels) >= limit:
            break
        labels += batch[1].tolist()
        yield batch


@dataclass(frozen=True)
class LoweredFile:
    """An ONNX file in the wanted precision, and what a reader should know of how it came there."""

    path: Path
    notes: tuple[str, ...] = ()


def file(path: Path, out: Path, wish: Wish, data: tuple[str | None, Progress]) -> LoweredFile:
    """Bring a bare ONNX file to a precision, beside its engine in the folder ``out``.

    A file that holds half-precision or quantised operators already is taken as it is.

    Args:
        path: The ONNX file.
        out: Folder of the result.
        wish: The precision and the form of int8 graph; its data is not looked at.
        data: Calibration recipe by name or path (or ``None``), and who hears of its notices.

    Raises:
        ConfigError: int8 without data for an fp32 file, data where nothing is converted, or an
            input or output that is no tensor of numbers.
        ExportError: The model cannot be converted.
        ParityError: The outputs differ too much from those of the file that came in.
    """
    recipe, progress = data
    wanted = wish.precision
    if wanted == "fp32" or precision.already(path) == wanted:
        if recipe is not None:
            raise ConfigError(
                f"--data {recipe}: found {path}, which is taken as it is for {wanted}, so that "
                "data does nothing; leave it out, or give the fp32 file for another precision"
            )
        return LoweredFile(path)
    _, outputs = onnx_file.signature(path)
    batches = open_recipe(recipe, BareFile.read(path)).need("int8") if recipe else None
    if wanted == "int8" and batches is None:
        raise ConfigError(
            f"{path}: found an fp32 file and no calibration data, expected --data RECIPE for int8 "
            "(or a file that holds quantised operators already)"
        )
    check_labels(batches, [spec.shape for spec in outputs])
    tell(progress, notices(batches))
    made = out / f"{path.stem}.{wanted}.onnx"
    with scratch(out) as folder:  # takes its own name only when it is good enough
        found = lower(path, folder / made.name, replace(wish, batches=batches))
        parity.require(found.parity, f"{path.name} and its {wanted} form")
        (folder / made.name).replace(made)
    return LoweredFile(made, (*notices(batches), found.text()))


@dataclass(frozen=True)
class BareFile:
    """What a calibration recipe needs to know of an ONNX file."""

    example_inputs: tuple[Tensor, ...]
    preprocessing: Preprocessing | None = None

    @staticmethod
    def read(path: Path) -> BareFile:
        """Examples in the shapes that the file gives; a free dimension counts as 1."""
        sample = parity.random_samples(path)[0]
        inputs, _ = onnx_file.signature(path)
        tensors = (torch.from_numpy(sample[spec.name]) for spec in inputs)
        return BareFile(
            tuple(
                t[:1] if s.shape[:1] == (-1,) else t for t, s in zip(tensors, inputs, strict=True)
            )
        )
