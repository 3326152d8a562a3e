"""Criteria that look at data: gradients of a loss, or activations.

Each takes a ``Subject`` and batches of ``(inputs, labels)``. The loss is cross-entropy where
there are labels and the first output holds one row of class scores per sample; else half the mean
square of the outputs, whose gradient says which channels move the outputs at all. The model runs
in evaluation mode; its modes, gradients and ``requires_grad`` flags are left as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from prune2deploy.calibration import Batch, are_classes
from prune2deploy.errors import ConfigError
from prune2deploy.graph.build import positions
from prune2deploy.graph.calling import device_of, quiet, tensors_in
from prune2deploy.graph.layout import Layout
from prune2deploy.graph.recording import Recording
from prune2deploy.graph.trace import unwrap
from prune2deploy.importance.members import (
    Scores,
    Subject,
    mean_one,
    scaled_together,
    to_channels,
)
from prune2deploy.importance.weights import l2
from prune2deploy.modes import evaluating

Reduce = Callable[[Tensor], Tensor]


def taylor(subject: Subject, batches: Iterable[Batch]) -> Scores:
    """First-order change of the loss, ``|sum of weight x gradient|`` per channel.

    Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. Averaged
    over batches and over the members of an axis. Normalisation: one factor for the whole model,
    since all axes are measured in the same loss.
    """
    return scaled_together(_by_gradient(subject, batches, lambda product: product, torch.abs))


def fisher(subject: Subject, batches: Iterable[Batch]) -> Scores:
    """Second-order change of the loss, half the squared sum of ``weight x gradient`` per sample.

    Liu et al., "Group Fisher Pruning", ICML 2021. One backward pass per sample. Normalisation:
    one factor for the whole model.
    """
    return scaled_together(
        _by_gradient(subject, _samples(batches), lambda product: product, lambda s: s**2 / 2)
    )


def hessian(subject: Subject, batches: Iterable[Batch]) -> Scores:
    """Optimal Brain Damage: half the Hessian's diagonal times the squared weights, summed.

    LeCun et al., "Optimal Brain Damage", NIPS 1989; the diagonal is that of the empirical Fisher
    matrix (squared gradients of single samples). One backward pass per sample. Normalisation:
    one factor for the whole model.
    """
    return scaled_together(
        _by_gradient(subject, _samples(batches), lambda product: product**2 / 2, lambda s: s)
    )


def activation(subject: Subject, batches: Iterable[Batch]) -> Scores:
    """Mean absolute activation (Molchanov et al., "Pruning CNNs for Resource Efficient
    Inference", ICLR 2017).

    Taken at the output of every module without children that carries the axis, each scaled to a
    mean of one, then averaged. An axis that never appears at a module's output is scored by
    ``l2``. Normalisation: mean of one per axis.
    """  # noqa: D205  the title of the paper needs two lines
    meters = _meters(subject)
    with quiet(unwrap(subject.model)), _attached(meters):
        for inputs, _ in _on_device(subject, batches):
            subject.model(*inputs)
    sums: dict[str, list[Tensor]] = {}
    for meter in meters:
        for name, total in meter.totals.items():
            sums.setdefault(name, []).append(mean_one(total))
    missing = [axis.name for axis in subject.graph.prunable if axis.name not in sums]
    spare = l2(subject) if missing else {}
    return {
        axis.name: mean_one(torch.stack(sums[axis.name]).mean(0))
        if axis.name in sums
        else spare[axis.name]
        for axis in subject.graph.prunable
    }


class _Meter:
    """Sums the absolute output of one module per channel of each axis that it carries."""

    def __init__(self, module: nn.Module, dims: Layout, sizes: dict[int, tuple[str, int]]) -> None:
        self.module = module
        self.totals: dict[str, Tensor] = {}
        self._places = [
            (dim, *sizes[id(node)], torch.from_numpy(channel))
            for dim, term in enumerate(dims)
            for node, channel in positions(term)
            if id(node) in sizes
        ]
        self._rank = len(dims)

    @property
    def useful(self) -> bool:
        return bool(self._places)

    def __call__(self, module: nn.Module, args: object, result: object) -> None:
        if not isinstance(result, Tensor) or result.dim() != self._rank:
            return
        for dim, name, size, channel in self._places:
            if result.shape[dim] != len(channel):
                continue
            found = result.detach().abs().float().movedim(dim, 0).reshape(len(channel), -1)
            inside = channel >= 0
            total = self.totals.setdefault(name, torch.zeros(size, dtype=torch.float32))
            total.index_add_(0, channel[inside], found.mean(1).cpu()[inside])


def _meters(subject: Subject) -> list[_Meter]:
    recording: Recording = subject.graph.recording
    prunable = {axis.name: axis.size for axis in subject.graph.prunable}
    sizes = {
        key: (name, prunable[name])
        for key, name in recording.axis_names.items()
        if name in prunable
    }
    owners = subject.owners
    meters, done = [], set()
    for call in recording.calls:
        if call.name in done or len(call.outputs) != 1:
            continue
        module = owners.get(call.name)
        if module is None or next(module.children(), None) is not None:
            continue
        done.add(call.name)
        meter = _Meter(module, recording.values[call.outputs[0]].dims, sizes)
        if meter.useful:
            meters.append(meter)
    return meters


@contextmanager
def _attached(meters: list[_Meter]) -> Iterator[None]:
    handles = [meter.module.register_forward_hook(meter) for meter in meters]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _by_gradient(
    subject: Subject, batches: Iterable[Batch], element: Reduce, channel: Reduce
) -> Scores:
    """Mean over batches and members of ``channel(sum of element(weight x gradient))``."""
    axes = {axis.name: (axis.size, subject.counted(axis)) for axis in subject.graph.prunable}
    sums = {name: torch.zeros(size, dtype=torch.float32) for name, (size, _) in axes.items()}
    count = 0
    for products in _products(subject, batches):
        count += 1
        for name, (size, members) in axes.items():
            for member, _ in members:
                product = products.get(member.tensor)
                if product is not None:
                    sums[name] += channel(to_channels(element(product), member, size))
    return {name: total / max(count * len(axes[name][1]), 1) for name, total in sums.items()}


def _products(subject: Subject, batches: Iterable[Batch]) -> Iterator[dict[str, Tensor]]:
    """Weight times gradient of every parameter, batch by batch; tied names share theirs."""
    with _differentiable(unwrap(subject.model)) as parameters:
        for inputs, labels in _on_device(subject, batches):
            with torch.enable_grad():
                value = loss(subject.model(*inputs), labels)
            if not value.requires_grad:
                raise ConfigError(
                    "the model's output does not depend on its parameters through anything "
                    "that has a gradient; choose a criterion that needs none, such as l2"
                )
            distinct = list({id(p): p for p in parameters.values()}.values())
            found = torch.autograd.grad(value, distinct, allow_unused=True)
            gradients = dict(zip(map(id, distinct), found, strict=True))
            yield {
                name: parameter.detach().float() * gradient.float()
                for name, parameter in parameters.items()
                if (gradient := gradients[id(parameter)]) is not None
            }


def loss(outputs: object, labels: Tensor | None) -> Tensor:
    """Cross-entropy of class scores (batch, classes), else half the mean square of all outputs."""
    tensors = [t for t in tensors_in(outputs) if t.is_floating_point()]
    if not tensors:
        raise ConfigError("the model returns no tensor of floating-point numbers: nothing to score")
    first = tensors[0]
    if labels is not None and are_classes(labels, first.shape):
        return F.cross_entropy(first.float(), labels.long())
    means = [tensor.float().square().mean() / 2 for tensor in tensors]
    return torch.stack(means).sum()


@contextmanager
def _differentiable(model: nn.Module) -> Iterator[dict[str, nn.Parameter]]:
    """Evaluation mode with gradients for every floating-point parameter; restored on leaving."""
    parameters = {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if parameter.is_floating_point()
    }
    before = {name: parameter.requires_grad for name, parameter in parameters.items()}
    try:
        with evaluating(model):
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            yield parameters
    finally:
        for name, parameter in parameters.items():
            parameter.requires_grad_(before[name])


def _on_device(subject: Subject, batches: Iterable[Batch]) -> Iterator[Batch]:
    device = device_of(subject.model)
    empty = True
    for inputs, labels in batches:
        empty = False
        moved = tuple(tensor.to(device) for tensor in inputs)
        yield moved, None if labels is None else labels.to(device)
    if empty:
        raise ConfigError("the calibration data holds no batch; expected at least one sample")


def _samples(batches: Iterable[Batch]) -> Iterator[Batch]:
    """The same data, one sample at a time."""
    for inputs, labels in batches:
        for place in range(len(inputs[0])):
            one = slice(place, place + 1)
            yield tuple(t[one] for t in inputs), None if labels is None else labels[one]
