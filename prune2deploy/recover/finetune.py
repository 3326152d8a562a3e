"""Fine-tuning of a pruned classifier, taught by the model that it was pruned from.

In: the pruned module, its teacher, batches and :class:`FinetuneOptions`. Out: a new, trained
module; neither argument is changed. The loss mixes the labels' cross-entropy with the teacher's
softened outputs (Hinton et al., arXiv 1503.02531); the rate follows a cosine after a short warm-up
(Loshchilov and Hutter, arXiv 1608.03983); what is returned is the moving average of the weights
(Polyak and Juditsky, SIAM J. Control Optim. 30 (1992)) where that is asked for.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from prune2deploy.calibration import IGNORED, Batch, read, restarting
from prune2deploy.errors import ConfigError
from prune2deploy.recover.evaluate import logits_of, numbers, require_labels
from prune2deploy.recover.options import FinetuneOptions
from prune2deploy.surgery.copying import copied

RATE = 0.02  # highest, where there are steps enough
SETTLES = 100  # steps that training at that rate takes to settle

Progress = Callable[[int, int, float], None]
"""Called after each step with (step, of how many, loss)."""
Penalty = Callable[[nn.Module], Tensor]
"""Given the model in training, a scalar to be added to its loss."""


@runtime_checkable
class Shuffled(Protocol):
    """Batches whose samples can be put into another order."""

    def shuffled(self, seed: int) -> Iterable[Batch]:
        """Return the same samples in the order that ``seed`` decides."""


@dataclass(frozen=True, eq=False)
class Finetuned:
    """What :func:`finetune` gives back.

    Attributes:
        module: The trained module, in eval mode, float32, on the CPU.
        losses: Mean training loss of each epoch.
        steps: Optimiser steps taken.
        seconds: Wall time.
        note: What the caller should know, or empty.
    """

    module: nn.Module
    losses: tuple[float, ...]
    steps: int
    seconds: float
    note: str = ""

    def text(self) -> str:
        """One line for the report."""
        if self.note:
            return self.note
        return (
            f"trained for {len(self.losses)} epochs ({self.steps} steps, {self.seconds:.0f} s): "
            f"mean loss {self.losses[0]:.3g} in the first, {self.losses[-1]:.3g} in the last; "
            "accuracy on samples that were trained on is better than on others"
        )


def finetune(
    module: nn.Module,
    teacher: nn.Module | None,
    batches: Iterable[Batch] | None,
    options: FinetuneOptions | None = None,
    *,
    progress: Progress | None = None,
    penalty: Penalty | None = None,
) -> Finetuned:
    """Train a copy of ``module``.

    Args:
        module: The pruned classifier; takes the batches' inputs, returns (batch, classes).
        teacher: The original model, or ``None`` to learn from labels alone.
        batches: (inputs, labels or ``None``), a DataLoader or a list, iterated once per epoch;
            batches that can be ``shuffled(seed)`` are, before each epoch. Labels of -100 are left
            out. ``None`` trains nothing.
        options: See :class:`FinetuneOptions`.
        progress: Called after each step.
        penalty: Added to the loss, such as those of :mod:`prune2deploy.recover.sparse`.

    Returns:
        The trained module and how it went.

    Raises:
        ConfigError: No labels and no teacher, outputs that are not class scores, batches that can
            be read only once or are no pairs, labels that do not fit, a module without
            parameters, or a loss that is not finite.
    """
    options = options or FinetuneOptions()
    _check_kinds(module, teacher, options)
    started = time.monotonic()
    total = options.epochs * _length(restarting(batches)) if batches is not None else 0
    if batches is None or total == 0:
        why = "no data" if batches is None else "no epochs or no batches"
        return Finetuned(copied(module, {}), (), 0, 0.0, f"nothing was trained: {why}")
    device = options.place()
    with torch.random.fork_rng():
        torch.manual_seed(options.seed)
        student = copied(module, {}).to(device).train()
        run = _Run(student, _frozen(teacher, device), total, options)
        run.penalty = penalty
        losses = [
            _epoch(run, _ordered(batches, options.seed + epoch), progress)
            for epoch in range(options.epochs)
        ]
    trained = (run.average if run.average is not None else run.student).cpu().eval()
    return Finetuned(trained, tuple(losses), run.step, time.monotonic() - started)


@dataclass(frozen=True, eq=False)
class Training:
    """Teacher, batches and options of :func:`finetune`, to be called with a module later.

    Attributes:
        teacher: The original model, or ``None`` to learn from labels alone.
        batches: What to train on; may be gone through more than once.
        options: How to train.
    """

    teacher: nn.Module | None
    batches: Iterable[Batch]
    options: FinetuneOptions

    def __call__(self, module: nn.Module) -> Finetuned:
        """Train a copy of ``module``."""
        return finetune(module, self.teacher, self.batches, self.options)

    def rehearse(self, module: nn.Module) -> None:
        """Take one step with a copy of ``module``, so that what cannot be trained is told at once.

        Raises:
            ConfigError: See :func:`finetune`.
        """
        options = replace(self.options, epochs=1)
        finetune(module, self.teacher, [*islice(self.batches, 1)], options)

    @property
    def settles(self) -> bool:
        """Whether there are steps enough (half of ``SETTLES``) to leave where it starts."""
        return 2 * self.options.epochs * _length(self.batches) >= SETTLES


def _check_kinds(module: object, teacher: object, options: object) -> None:
    """Raise ConfigError where an argument of :func:`finetune` stands in the place of another."""
    for name, found, kind, wanted in (
        ("module", module, nn.Module, "the torch.nn.Module to train"),
        ("teacher", teacher, nn.Module | None, "the unpruned torch.nn.Module, or None"),
        ("options", options, FinetuneOptions, "FinetuneOptions(epochs=...)"),
    ):
        if not isinstance(found, kind):
            raise ConfigError(
                f"finetune(module, teacher, batches, options): found a {type(found).__name__} as "
                f"{name}, expected {wanted}"
            )


class _Run:
    """The moving parts of one training run."""

    def __init__(
        self, student: nn.Module, teacher: nn.Module | None, total: int, options: FinetuneOptions
    ) -> None:
        self.student = student
        self.teacher = teacher
        self.penalty: Penalty | None = None
        self.options = options
        self.total = total
        self.highest = highest_rate(total) if options.lr is None else options.lr
        self.step = 0
        self.average = copied(student, {}) if options.ema else None
        self.device = options.place()
        if not any(p.requires_grad for p in student.parameters()):
            # as read for inference; who freezes a part means it
            for weight in student.parameters():
                weight.requires_grad_(weight.is_floating_point())
        weights = [p for p in student.parameters() if p.requires_grad]
        if not weights:
            raise ConfigError("fine-tuning: found no parameter to train, expected a module of some")
        short = next((p.dtype for p in weights if p.element_size() < 4), None)  # in bytes
        if short is not None:
            raise ConfigError(
                f"fine-tuning: found weights in {short}, in which the steps of training are lost "
                "to rounding, expected torch.float32: train module.float(), with a teacher and "
                "data in float32, and convert it afterwards"
            )
        groups = [
            {"params": [p for p in weights if p.ndim > 1], "weight_decay": options.weight_decay},
            {"params": [p for p in weights if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.SGD(
            [group for group in groups if group["params"]],
            lr=self.highest,
            momentum=options.momentum,
            nesterov=options.momentum > 0,
        )
        self.amp = options.amp and self.device.type == "cuda"
        bfloat16 = self.amp and torch.cuda.is_bf16_supported()
        self.dtype = torch.bfloat16 if bfloat16 else torch.float16
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.amp and not bfloat16)


def _epoch(run: _Run, batches: Iterable[Batch], progress: Progress | None) -> float:
    losses = []
    for batch in read(batches):
        loss = _step(run, batch)
        losses.append(loss)
        if progress is not None:
            progress(run.step, run.total, loss)
    return sum(losses) / max(len(losses), 1)


def _step(run: _Run, batch: Batch) -> float:
    inputs = tuple(one.to(run.device, non_blocking=True) for one in batch[0])
    labels = None if batch[1] is None else numbers(batch[1].to(run.device, non_blocking=True))
    for group in run.optimizer.param_groups:
        group["lr"] = run.highest * learning_rate(run.step, run.total, run.options.warmup)
    alone = len(inputs[0]) < 2
    with (
        _batch_norms_at_rest(run.student) if alone else nullcontext(),
        torch.autocast(run.device.type, dtype=run.dtype, enabled=run.amp),
    ):
        student = logits_of(run.student(*inputs))
        with torch.no_grad():
            teacher = None if run.teacher is None else logits_of(run.teacher(*inputs)).float()
    if teacher is not None and teacher.shape != student.shape:
        raise ConfigError(
            f"fine-tuning: found scores of shape {tuple(teacher.shape)} from the teacher, expected "
            f"{tuple(student.shape)} as from the model that it teaches"
        )
    if labels is not None:
        require_labels(labels, student, soft=True)
        labels = None if bool((labels == IGNORED).all()) else labels
    loss = distillation_loss(student.float(), teacher, labels, run.options)
    if run.penalty is not None:
        loss = loss + run.penalty(run.student)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise ConfigError(f"fine-tuning: the loss is {value} at step {run.step}; {_cause(run)}")
    run.optimizer.zero_grad(set_to_none=True)
    run.scaler.scale(loss).backward()
    run.scaler.unscale_(run.optimizer)
    nn.utils.clip_grad_norm_(run.student.parameters(), run.options.clip)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.step += 1
    _update_average(run)
    return value


def _cause(run: _Run) -> str:
    """The likely cause of a loss that is not finite, and what to do about it."""
    if run.step == 0:
        return (
            "nothing has been trained yet, so outputs of the model or its teacher are not finite; "
            "check the weights and the data"
        )
    return f"the learning rate {run.highest:g} is too high for this model, try {run.highest / 10:g}"


@contextmanager
def _batch_norms_at_rest(module: nn.Module) -> Iterator[None]:
    """Let BatchNorm use its running statistics: one sample alone has no variance."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    for norm in norms:
        norm.eval()
    try:
        yield
    finally:
        for norm in norms:
            norm.train()


def highest_rate(total: int) -> float:
    """Return the highest rate for so many steps in all.

    >>> highest_rate(1000), highest_rate(50)
    (0.02, 0.005)
    """
    return RATE * min(1.0, total / SETTLES) ** 2


def learning_rate(step: int, total: int, warmup: float) -> float:
    """Return the share of the highest rate at a step: a linear rise, then a cosine down to zero.

    >>> learning_rate(5, 10, 0.0)
    0.5
    """
    rise = warmup * total
    if step < rise:
        return (step + 1) / (rise + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(total - rise, 1)))


def distillation_loss(
    student: Tensor, teacher: Tensor | None, labels: Tensor | None, options: FinetuneOptions
) -> Tensor:
    """Return (1 - alpha) * cross-entropy + alpha * T^2 * KL(teacher || student), a scalar.

    Args:
        student: Class scores, (batch, classes).
        teacher: The teacher's, or ``None`` to learn from labels alone.
        labels: (batch,), or ``None`` to learn from the teacher alone.
        options: ``alpha`` and ``temperature`` are read.

    Raises:
        ConfigError: Neither teacher nor labels.
    """
    if teacher is None and labels is None:
        raise ConfigError(
            "fine-tuning needs labels or a teacher; found neither for a batch (labels of "
            f"{IGNORED} are left out)"
        )
    soft = hard = student.new_zeros(())
    if teacher is not None:
        heat = options.temperature
        soft = heat**2 * F.kl_div(
            F.log_softmax(student / heat, 1),
            F.log_softmax(teacher / heat, 1),
            reduction="batchmean",
            log_target=True,
        )
    if labels is not None:
        hard = F.cross_entropy(student, labels)
    alpha = 1.0 if labels is None else 0.0 if teacher is None else options.alpha
    return alpha * soft + (1 - alpha) * hard


def _update_average(run: _Run) -> None:
    if run.average is None:
        return
    decay = min(run.options.ema, (1 + run.step) / (10 + run.step))  # follow quickly at first
    with torch.no_grad():
        for mean, value in zip(_tensors(run.average), _tensors(run.student), strict=True):
            if value.is_floating_point():  # what is equal may be infinite, such as masks
                mean.copy_(torch.where(mean == value, value, mean.lerp(value, 1 - decay)))
            else:
                mean.copy_(value)


def _tensors(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, one that is used in several places once."""
    return [*module.parameters(), *module.buffers()]


def _frozen(teacher: nn.Module | None, device: torch.device) -> nn.Module | None:
    return None if teacher is None else copied(teacher, {}).to(device).eval()


def _length(batches: Iterable[Batch]) -> int:
    return len(batches) if isinstance(batches, Sized) else sum(1 for _ in batches)


def _ordered(batches: Iterable[Batch], seed: int) -> Iterable[Batch]:
    return batches.shuffled(seed) if isinstance(batches, Shuffled) else batches
