"""What every width is worth: losses measured where there is data, else channel scores.

In: a workshop, scores of channels, data or none, and whether training follows. Out: curves for
``plan.choices``, and a line for the report that says where they are from. Measured losses are
journaled one by one, and kept for other runs under a hash of the model, data and widths: they do
not depend on the device, so another budget, or another target, does not measure them again.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch import Tensor
from torch.nn import functional

from prune2deploy import atomic
from prune2deploy.calibration import Batch, Batches, are_classes, first, serves
from prune2deploy.graph.axes import Counts
from prune2deploy.identity import code_digest, weights_digest
from prune2deploy.journal import decode, encode
from prune2deploy.plan import sensitivity
from prune2deploy.plan.allocate import channels
from prune2deploy.plan.choices import Choice, choices, importance_curves, trained_curves
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.sensitivity import Sensitivity
from prune2deploy.recover.batchnorm import reestimate_batchnorm
from prune2deploy.recover.distance import apart, outputs
from prune2deploy.search import depth
from prune2deploy.search.candidate import Workshop
from prune2deploy.surgery.slicing import apply as apply_plan

Scores = Mapping[str, npt.ArrayLike]
Floats = npt.NDArray[np.float64]

SCHEMA = 1  # 1: losses by weights, code, scores, data and widths
SAMPLES = 512  # that losses are taken on, at most
LEAST = 32  # and at least, however long it takes
SECONDS = 600.0  # that all losses together may take before fewer samples are used
TRIED = 3  # widths of each choice that losses are taken at, about
BATCH = 32
TIE = 0.01  # weight of data-free worth beside measured losses, to decide between equal ones

DATA_FREE = "widths chosen by data-free scores"
BALANCED = "widths kept in balance by scores, because training follows"


@dataclass(frozen=True)
class Measured:
    """Losses as they are kept for other runs: on how many samples, and by first axis."""

    samples: int
    found: Mapping[str, Sensitivity]


@dataclass(frozen=True, eq=False)
class Worth:
    """Worth of widths.

    Attributes:
        curves: Axis name to worth by kept channels, float array (size + 1,).
        note: Where they are from.
        samples: That the curves are losses on; 0 where they are from scores.
        data: Whether there is data to take losses on.
    """

    curves: Mapping[str, Floats]
    note: str
    samples: int = 0
    data: bool = False


def find(
    shop: Workshop, scores: Scores, multiple: int, keep_in: Path | None, *, trains: bool = False
) -> Worth:
    """Measure what widths are worth if the run has data for it; else derive it from the scores.

    Losses are measured without training, so they say nothing about what training restores: where
    training follows, they decide which blocks to take out, but not the widths.

    Args:
        shop: Model, graph, data and journal of the run.
        scores: Axis name to one score per channel.
        multiple: Channel multiple of the target; widths on its grid are tried.
        keep_in: Folder that measured losses are kept in for other runs, or ``None``.
        trains: Whether the pruned model will be trained.

    Raises:
        PlanError: The loss of the unpruned model is not finite.
    """
    free = importance_curves(shop.graph, scores)
    offered = choices(shop.graph, free, multiple=multiple)
    lacks = _lacks(shop)
    if trains:
        return Worth(trained_curves(shop.graph, scores), BALANCED, data=not lacks)
    if lacks:
        return Worth(free, f"{DATA_FREE}: {lacks}")
    held = None if keep_in is None else keep_in / f"{_key(shop, scores, offered)}.json"
    measured = _measure(shop, scores, offered, held)
    rises = sensitivity.curves(shop.graph, measured.found)
    told = f"widths chosen by sensitivity measured on {measured.samples} samples"
    return Worth(blended(rises, free, TIE), told, measured.samples, data=True)


def _lacks(shop: Workshop) -> str:
    """Why no losses can be measured; empty where they can."""
    if shop.batches is None:
        return "there is no data (add --data to have them measured)"
    if not serves(shop.batches, "sensitivity"):
        return f"recipe {shop.batches.name!r} is not for 'sensitivity'"
    return ""


def blended(
    rises: Mapping[str, Floats], free: Mapping[str, Floats], weight: float
) -> dict[str, Floats]:
    """Measured and data-free worth together: at weight 1 both span as much over all axes."""
    span = sum(float(-curve.min()) for curve in rises.values()) or float(len(rises))
    return {axis: rises[axis] + weight * span * free[axis] for axis in rises}


def of_blocks(shop: Workshop, scores: Scores, worth: Worth, build: int) -> dict[str, float]:
    """What the objective loses with each removable block, beside the worth of its axes.

    Where losses are measured, it is the rise of the loss without the block. Where they are not,
    its axes say all that is known. Where training follows, the axes have worth by scores and the
    rises choose blocks: scaled, so that they weigh as much in all as the axes of the blocks.

    Args:
        shop: Model, graph, data and journal of the run.
        scores: Axis name to one score per channel.
        worth: Of the widths.
        build: Number of the build that it is for, which progress tells.
    """
    names = [block.name for block in depth.removable(shop.graph)]
    if not worth.data:
        return dict.fromkeys(names, 0.0)
    rises = _rises(shop, scores, worth, names, build)
    if worth.samples:
        return rises
    axes = {axis for name in names for axis in depth.gone(shop.graph, name)}
    whole = sum(float(worth.curves[axis][-1]) for axis in axes if axis in worth.curves)
    total = sum(rise for rise in rises.values() if math.isfinite(rise))
    return {name: rise * (whole / total if total else 1.0) for name, rise in rises.items()}


def _rises(
    shop: Workshop, scores: Scores, worth: Worth, names: Sequence[str], build: int
) -> dict[str, float]:
    """How much the loss rises without each block."""

    def work() -> dict[str, float]:
        samples = worth.samples or _samples(shop, scores, len(names))
        loss = Loss(shop, scores, _first(shop, samples))
        base, found = loss({}), {}
        for number, name in enumerate(names, start=1):
            shop.say("measuring what blocks are worth", build, f"{number} of {len(names)}")
            found[name] = max(0.0, loss.of(Plan({}, removed=(name,))) - base)
        return found

    return shop.run.journal.once("sensitivity of blocks", dict[str, float], work)


def _key(shop: Workshop, scores: Scores, offered: Sequence[Choice]) -> str:
    """Hash of everything that the losses depend on, but for how many samples there is time for."""
    model = (SCHEMA, weights_digest(shop.module), code_digest(shop.module))
    digest = hashlib.sha256(json.dumps(model).encode())
    for axis in sorted(scores):
        digest.update(np.ascontiguousarray(scores[axis], dtype=np.float64).tobytes())
    for inputs, labels in _first(shop, LEAST):
        for tensor in (*inputs, *(() if labels is None else (labels,))):
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    asked = [[*choice.axes, *choice.options.tolist()] for choice in offered]
    digest.update(json.dumps(asked).encode())
    return digest.hexdigest()


def ranking(shop: Workshop, scores: Scores, worth: Worth) -> Callable[[Plan, int], float] | None:
    """The loss of a whole plan, at a build for progress; ``None`` where losses do not decide.

    Each is measured once in a run: data that comes in another order another time would tell plans
    apart in another way, and a run that goes on must repeat its decisions.
    """
    if not worth.samples:
        return None

    @cache
    def loss() -> Loss:
        return Loss(shop, scores, _first(shop, worth.samples))

    taken = itertools.count(1)

    def rank(plan: Plan, build: int) -> float:
        def work() -> float:
            shop.say("comparing plans of equal predicted latency", build, f"number {next(taken)}")
            return loss().of(plan)

        plain = hashlib.sha256(plan.to_json().encode()).hexdigest()
        return shop.run.journal.once(f"loss of plan/{plain[:16]}", float, work)

    return rank


class Loss:
    """Loss of the model with given counts, BatchNorm re-estimated.

    Cross-entropy where there are labels and class scores, else the squared difference of the
    outputs to those of the unpruned model, relative to their size.
    """

    def __init__(self, shop: Workshop, scores: Scores, batches: Sequence[Batch]) -> None:
        self._shop, self._scores, self._batches = shop, scores, batches
        whole = apply_plan(shop.module, shop.graph, Plan({}), shop.example_inputs)
        reestimate_batchnorm(whole, batches)
        self._reference = [outputs(whole, inputs) for inputs, _ in batches]

    def __call__(self, counts: Counts) -> float:
        """Loss of the model that keeps ``counts`` channels; absent axes keep all."""
        return self.of(channels(self._shop.graph, self._scores, counts))

    def of(self, plan: Plan) -> float:
        """Loss of the model pruned by a plan; infinite where its outputs are no numbers."""
        shop = self._shop
        module = apply_plan(shop.module, shop.graph, plan, shop.example_inputs)
        reestimate_batchnorm(module, self._batches)
        total, samples = 0.0, 0
        for wanted, (inputs, labels) in zip(self._reference, self._batches, strict=True):
            found = outputs(module, inputs)
            size = len(found[0])
            total += size * _loss(found, wanted, labels)
            samples += size
        return math.inf if math.isnan(total) else total / max(samples, 1)


def _loss(found: list[Tensor], wanted: list[Tensor], labels: Tensor | None) -> float:
    scores = found[0]
    if labels is not None and are_classes(labels, scores.shape):
        return float(functional.cross_entropy(scores, labels.long().to(scores.device)))
    return apart(found, wanted)


def _samples(shop: Workshop, scores: Scores, losses: int) -> int:
    """How many samples allow so many losses within ``SECONDS``; decided once per run."""

    def work() -> int:
        few = _first(shop, LEAST)
        seen = sum(len(inputs[0]) for inputs, _ in few)
        started = time.monotonic()
        loss = Loss(shop, scores, few)
        started, before = time.monotonic(), time.monotonic() - started
        loss({})
        each = min(before, time.monotonic() - started) / max(seen, 1)
        return int(min(SAMPLES, max(LEAST, SECONDS / max(each * losses, 1e-9))))

    return shop.run.journal.once("sensitivity/samples", int, work)


def _first(shop: Workshop, samples: int) -> list[Batch]:
    """The first samples of the run's data; a recipe's in batches of our size."""
    assert shop.batches is not None
    batches = shop.batches
    return first(batches.rebatched(BATCH) if isinstance(batches, Batches) else batches, samples)


def _measure(
    shop: Workshop, scores: Scores, offered: Sequence[Choice], held: Path | None
) -> Measured:
    """Take every loss that neither this run nor an earlier one has taken, for the first build."""
    journal = shop.run.journal
    before = _read(held, offered)
    if before is not None and "sensitivity/samples" not in journal:
        journal.write("sensitivity/samples", before.samples)
        for one in before.found.values():
            journal.write(f"sensitivity/{one.axes[0]}", one)
    samples = _samples(shop, scores, TRIED * len(offered))
    batches = _first(shop, samples)
    keys = {choice.axes[0]: f"sensitivity/{choice.axes[0]}" for choice in offered}
    known = {n: journal.read(key, Sensitivity) for n, key in keys.items() if key in journal}
    if len(known) < len(keys):
        known = sensitivity.measure(
            offered,
            Loss(shop, scores, batches),
            known=known,
            tell=lambda done, total: shop.say("measuring sensitivity", 1, f"{done} of {total}"),
            keep=lambda one: journal.write(keys[one.axes[0]], one),
        )
    measured = Measured(sum(len(inputs[0]) for inputs, _ in batches), known)
    if held is not None and before is None:
        _write(held, measured)
    return measured


def _read(held: Path | None, offered: Sequence[Choice]) -> Measured | None:
    """Losses that an earlier run kept; ``None`` where they are not there or not whole."""
    if held is None:
        return None
    try:
        found = decode(Measured, json.loads(held.read_text("utf-8")))
    except (OSError, ValueError, TypeError, AttributeError):
        return None
    wanted = {choice.axes[0] for choice in offered}
    return found if isinstance(found, Measured) and wanted == set(found.found) else None


def _write(held: Path, measured: Measured) -> None:
    try:
        atomic.write_text(held, json.dumps(encode(measured)))
    except OSError:
        return  # the losses are in the journal of this run all the same
