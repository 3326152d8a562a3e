"""fp32 ONNX file → the file that is built, in the precision of the run.

In: a simplified fp32 file and :class:`LoweringOptions`. Out: the file, and :class:`Lowered`, which
says what it took: nodes that stayed in higher precision, agreement with the fp32 file, accuracy
where there are labels. Outputs that differ too much raise nothing here: whether that matters
depends on what the file is for, so the caller looks at ``passed``.

The search needs latency only, and latency does not depend on the values of scales. So its int8
files take their ranges from a few samples and keep those nodes in fp32 that the unpruned model
keeps; the file that is shipped is calibrated on all samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from prune2deploy.atomic import scratch
from prune2deploy.backends import onnx_file
from prune2deploy.calibration import (
    IGNORED,
    Batch,
    Batches,
    Preprocessing,
    are_classes,
    check_labels,
    first,
    notices,
    open_recipe,
    serves,
)
from prune2deploy.errors import ConfigError, ParityError
from prune2deploy.exporting import parity, precision
from prune2deploy.exporting.keeping import AccuracyLimit
from prune2deploy.exporting.parity import Parity
from prune2deploy.exporting.precision import Int8Options, PrecisionReport
from prune2deploy.exporting.ranges import feeds
from prune2deploy.progress import Progress, tell

QUICK_SAMPLES = 8  # samples for int8 ranges where only latency matters
SCORED_SAMPLES = 512  # most samples that the accuracy of a file is taken on


@dataclass(frozen=True, eq=False)
class LoweringOptions:
    """How to bring a file to a lower precision.

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
        method: How int8 ranges are found, unless it is ``quick``; see ``ranges``.
    """

    precision: str
    recipe: str = "tensorrt"
    batches: Iterable[Batch] | None = None
    keep: tuple[str, ...] = ()
    quick: bool = False
    max_drop: float | None = None
    store: Path | None = None
    samples: Sequence[Mapping[str, parity.Array]] | None = None
    method: str = "minmax"


@dataclass(frozen=True)
class Lowered:
    """What bringing a file to its precision took.

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


def lower(path: Path, out: Path, options: LoweringOptions) -> Lowered:
    """Write ``path`` in the wanted precision to ``out``.

    Raises:
        ConfigError: int8 without data, or accuracy is to decide and there are no class labels.
        ExportError: The model cannot be converted.
    """
    if options.precision == "fp16":
        tolerance = math.inf if options.quick else None
        samples = options.samples
        if options.batches is not None and serves(options.batches, "parity"):
            samples = list(feeds(path, first(options.batches, QUICK_SAMPLES)))
        report = precision.to_fp16(
            path,
            out,
            samples=samples,
            keep=options.keep,
            tolerance=tolerance,
            accuracy=_accuracy(path, options),
        )
        return _described(path, report, options)
    if options.batches is None:
        raise ConfigError("precision int8 needs calibration data: add --data RECIPE")
    batches = first(options.batches, QUICK_SAMPLES) if options.quick else options.batches
    report = precision.to_int8(path, out, batches, _int8_options(path, options))
    return _described(path, report, options)


def _int8_options(path: Path, options: LoweringOptions) -> Int8Options:
    base = Int8Options(recipe=options.recipe, keep=options.keep)
    if options.quick:
        return replace(base, max_error=math.inf)
    data = options.batches.sha256 if isinstance(options.batches, Batches) else ""
    accuracy = _accuracy(path, options)
    return replace(base, method=options.method, data=data, store=options.store, accuracy=accuracy)


def _accuracy(path: Path, options: LoweringOptions) -> AccuracyLimit | None:
    """What decides where accuracy is to; ``None`` where the outputs' difference is."""
    data, allowed = options.batches, options.max_drop
    if allowed is None or options.quick:
        return None

    def evaluate(file: Path, batches: Iterable[Batch] | None = data) -> float:
        found = top1(file, batches) if batches is not None else None
        if found is None:
            raise ConfigError(
                "--max-drop: found data without class labels, or with others among them, or a "
                "model that gives no class scores of shape (batch, classes); leave it out, and "
                "the difference of the outputs decides"
            )
        return found[0]

    evaluate(path, None if data is None else first(data, QUICK_SAMPLES))
    return AccuracyLimit(evaluate, allowed)


def _described(path: Path, report: PrecisionReport, options: LoweringOptions) -> Lowered:
    """What the report says of the file, judged as a file to ship even if it was made quickly."""
    scored = not options.quick and serves(options.batches, "evaluate")
    data = options.batches if scored else None
    plain = top1(path, data) if data is not None else None
    own = top1(report.path, data) if data is not None and plain is not None else None
    limit = parity.TOLERANCE[options.precision] if options.quick else report.parity.tolerance
    passed = report.parity.error <= limit if options.quick else report.passed
    return Lowered(
        precision=report.precision,
        kept=report.kept,
        parity=replace(report.parity, tolerance=limit, passed=passed),
        passed=passed,
        quick=options.quick,
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
        wanted = torch.tensor(labels[seen : seen + len(feed[inputs[0].name])])
        scores = run(feed)[outputs[0].name][: len(wanted)]
        if bool((wanted != IGNORED).any()) and not are_classes(wanted, scores.shape):
            return None
        right += int((scores.argmax(1) == wanted.numpy()).sum())
        seen += len(wanted)
    scored = sum(label != IGNORED for label in labels[:seen])
    return (right / scored, scored) if scored else None


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


def lower_file(
    path: Path, out: Path, options: LoweringOptions, recipe: str | None, progress: Progress
) -> LoweredFile:
    """Bring a bare ONNX file to a precision, beside its engine in the folder ``out``.

    A file that holds half-precision or quantised operators already is taken as it is.

    Args:
        path: The ONNX file.
        out: Folder of the result.
        options: The precision and the form of int8 graph; its data is not looked at.
        recipe: Calibration recipe by name or path, or ``None``.
        progress: Hears of the notices of the recipe.

    Raises:
        ConfigError: int8 without data for an fp32 file, data where nothing is converted, or an
            input or output that is no tensor of numbers.
        ExportError: The model cannot be converted.
        ParityError: The outputs differ too much from those of the file that came in.
    """
    wanted = options.precision
    if wanted == "fp32" or precision.already(path) == wanted:
        if recipe is not None:
            raise ConfigError(
                f"--data {recipe}: found {path}, which is taken as it is for {wanted}, so that "
                "data does nothing; leave it out, or give the fp32 file for another precision"
            )
        return LoweredFile(path)
    _, outputs = onnx_file.signature(path)
    purpose = "int8" if wanted == "int8" else "parity"
    batches = open_recipe(recipe, BareFile.read(path)).need(purpose) if recipe else None
    if wanted == "int8" and batches is None:
        raise ConfigError(
            f"{path}: found an fp32 file and no calibration data, expected --data RECIPE for int8 "
            "(or a file that holds quantised operators already)"
        )
    check_labels(batches, [spec.shape for spec in outputs])
    tell(progress, notices(batches))
    made = out / f"{path.stem}.{wanted}.onnx"
    with scratch(out) as folder:  # takes its own name only when it is good enough
        found = lower(path, folder / made.name, replace(options, batches=batches))
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
