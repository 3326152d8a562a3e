"""Importance of a group's channels, under the names that users of Torch-Pruning know.

An importance is a function of a group: one score per position of ``group[0].idxs``, higher means
keep, ``None`` where the group has nothing to score. Scores of each layer are added up per root
position, combined over layers (``group_reduction``) and scaled (``normalizer``). The loop of this
package uses ``prune2deploy.importance`` instead, which scores axes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prune2deploy.errors import ConfigError
from prune2deploy.pruning.group import Group, Item

TARGETS: tuple[type[Any], ...] = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
)
BATCHNORMS: tuple[type[Any], ...] = (nn.modules.batchnorm._BatchNorm,)


def _safe(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def _lamp(scores: Tensor) -> Tensor:
    """Each score over the sum of all that are at least as large (Lee et al., ICLR 2021)."""
    ranked, order = scores.sort()
    upward = ranked.flip(0).cumsum(0).flip(0)
    return torch.empty_like(ranked).index_copy_(0, order, ranked / _safe(upward))


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s / _safe(s.sum()),
    "mean": lambda s: s / _safe(s.mean()),
    "max": lambda s: s / _safe(s.max()),
    "standarization": lambda s: (s - s.min()) / _safe(s.max() - s.min()),
    "gaussian": lambda s: (s - s.mean()) / _safe(s.std(unbiased=False)),
    "lamp": _lamp,
}
"""Name of a normaliser → what it does; ``sentinel_0.5`` divides by the median, and so on."""

REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "sum": lambda s: s.sum(0),
    "mean": lambda s: s.mean(0),
    "max": lambda s: s.amax(0),
    "prod": lambda s: s.prod(0),
    "first": lambda s: s[0],
    "gate": lambda s: s[-1],
}
"""Name of a reduction over layers → what it does to (layers, channels)."""


class Importance(ABC):
    """A function of a group; derive from it, or pass any function with this signature."""

    @abstractmethod
    def __call__(self, group: Group) -> Tensor | None:
        """Scores of ``group[0].idxs``, higher is kept; ``None`` leaves the group alone."""


class GroupMagnitudeImportance(Importance):
    """Sum of absolute weights to the power ``p`` (Li et al., ICLR 2017; Fang et al., CVPR 2023).

    Args:
        p: The power.
        group_reduction: How layers are combined: one of ``REDUCTIONS``, or ``None`` to get one
            row per layer.
        normalizer: How the result is scaled: one of ``SCALES``, a function, or ``None``.
        bias: Whether biases count too.
        target_types: Layers that count; by default convolutions, linear layers, batch and layer
            normalisation, or whatever has parameters where a group has none of these.
    """

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
        target_types: Sequence[type[Any]] | None = None,
    ) -> None:
        if group_reduction is not None and group_reduction not in REDUCTIONS:
            raise ConfigError(
                f"no group reduction is called {group_reduction!r}; choose one of "
                f"{', '.join(REDUCTIONS)} or None"
            )
        self.p = p
        self.group_reduction = group_reduction
        self.normalizer = normalizer
        self.bias = bias
        self.target_types = None if target_types is None else tuple(target_types)

    @torch.no_grad()
    def __call__(self, group: Group) -> Tensor | None:
        """Scores of the group's root positions."""
        items = [item for item in group if isinstance(item.dep.layer, self.target_types or TARGETS)]
        rows = list(self._rows(group, items))
        if not rows and self.target_types is None:
            rows = list(self._rows(group, list(group)))
        if not rows:
            return None
        stacked = torch.stack(rows)
        if self.group_reduction is None:
            return stacked
        return self._scaled(REDUCTIONS[self.group_reduction](stacked))

    def _rows(self, group: Group, items: Sequence[Item]) -> Iterator[Tensor]:
        """Scores of each layer's tensors, moved to the root's positions."""
        parameters = dict(group._DG.model.named_parameters(remove_duplicate=False))
        for item in items:
            for name, dim in item.tensors:
                parameter = parameters.get(name)
                if parameter is None or not (self.bias or not name.endswith("bias")):
                    continue
                found = self.positions(item, parameter, dim)
                if found is not None and len(found) >= len(item.idxs) > 0:
                    values = found.float().cpu()[item.idxs]
                    root = torch.tensor(item.root_idxs)
                    yield torch.zeros(len(group[0].idxs)).index_add_(0, root, values)

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """One number per position of a dimension; ``None`` where there is nothing to go by."""
        values = self.element(parameter)
        return (
            None
            if values is None
            else values.movedim(dim, 0).reshape(len_of(values, dim), -1).sum(1)
        )

    def element(self, parameter: nn.Parameter) -> Tensor | None:
        """One number per weight."""
        return parameter.detach().abs() ** self.p

    def _scaled(self, scores: Tensor) -> Tensor:
        if self.normalizer is None:
            return scores
        if callable(self.normalizer):
            return self.normalizer(scores)
        if self.normalizer.startswith("sentinel_"):
            place = int(float(self.normalizer.partition("_")[2]) * len(scores))
            return scores / _safe(scores.sort().values[min(place, len(scores) - 1)])
        if self.normalizer not in SCALES:
            raise ConfigError(
                f"no normaliser is called {self.normalizer!r}; choose one of {', '.join(SCALES)}, "
                "sentinel_FRACTION, a function or None"
            )
        return SCALES[self.normalizer](scores)


def len_of(values: Tensor, dim: int) -> int:
    """Positions of a dimension."""
    return values.shape[dim]


class MagnitudeImportance(GroupMagnitudeImportance):
    """The same as ``GroupMagnitudeImportance``."""


class BNScaleImportance(GroupMagnitudeImportance):
    """Absolute scale of batch normalisation (Liu et al., "Network Slimming", ICCV 2017).

    Groups without batch normalisation are left alone.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
    ) -> None:
        super().__init__(1, group_reduction, normalizer, target_types=BATCHNORMS)


class LAMPImportance(GroupMagnitudeImportance):
    """Energy over that of all channels at least as large (Lee et al., "LAMP", ICLR 2021)."""

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "mean",
        normalizer: str = "lamp",
        bias: bool = False,
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)


class FPGMImportance(GroupMagnitudeImportance):
    """Distance to the other channels of the layer (He et al., "FPGM", CVPR 2019)."""

    def __init__(
        self,
        p: int = 2,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
    ) -> None:
        super().__init__(p, group_reduction, normalizer, bias)

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """Sum of distances between rows."""
        if parameter.dim() < 2:
            return None
        rows = parameter.detach().float().movedim(dim, 0).flatten(1)
        return torch.cat([torch.cdist(part, rows, p=self.p).sum(1) for part in rows.split(1024)])


class RandomImportance(Importance):
    """Uniform random scores from torch's generator (``torch.manual_seed`` fixes them)."""

    def __call__(self, group: Group) -> Tensor:
        """Random numbers."""
        return torch.rand(len(group[0].idxs))


class GroupTaylorImportance(GroupMagnitudeImportance):
    """Absolute weight times gradient (Molchanov et al., CVPR 2019); call ``backward()`` first.

    Args:
        group_reduction: As in ``GroupMagnitudeImportance``.
        normalizer: As there.
        multivariable: Take the absolute value after summing over a channel's weights.
        bias: As there.
        target_types: As there.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        multivariable: bool = False,
        bias: bool = False,
        target_types: Sequence[type[Any]] | None = None,
    ) -> None:
        super().__init__(1, group_reduction, normalizer, bias, target_types)
        self.multivariable = multivariable

    def __call__(self, group: Group) -> Tensor | None:
        """Scores of the group's root positions."""
        if all(p.grad is None for p in group._DG.model.parameters()):
            raise ConfigError(
                "no parameter has a gradient: run the model on data and call loss.backward() "
                "before pruning by gradients, and zero_grad() afterwards"
            )
        return super().__call__(group)

    def element(self, parameter: nn.Parameter) -> Tensor | None:
        """Weight times gradient."""
        if parameter.grad is None:
            return None
        product = parameter.detach() * parameter.grad
        return product if self.multivariable else product.abs()

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """Absolute sum per position."""
        found = super().positions(item, parameter, dim)
        return None if found is None else found.abs()


class TaylorImportance(GroupTaylorImportance):
    """The same as ``GroupTaylorImportance``."""


class GroupHessianImportance(GroupMagnitudeImportance):
    """Squared weights times mean squared gradients: Optimal Brain Damage (LeCun et al., 1989).

    Call ``accumulate_grad(model)`` after the backward pass of each sample or small batch. Without
    that the gradients that are there are taken for one such pass.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
        target_types: Sequence[type[Any]] | None = None,
    ) -> None:
        super().__init__(2, group_reduction, normalizer, bias, target_types)
        self.zero_grad()

    def zero_grad(self) -> None:
        """Forget what was accumulated."""
        self._squares = WeakTensorKeyDictionary()  # of Tensor
        self._passes = 0

    @torch.no_grad()
    def accumulate_grad(self, model: nn.Module) -> None:
        """Add the squared gradients that the model holds now."""
        self._passes += 1
        for parameter in model.parameters():
            if parameter.grad is not None:
                square = parameter.grad.detach() ** 2
                known = self._squares.get(parameter)
                self._squares[parameter] = square if known is None else known + square

    def __call__(self, group: Group) -> Tensor | None:
        """Scores of the group's root positions."""
        if not self._passes:
            self.accumulate_grad(group._DG.model)
        if not len(self._squares):
            self._passes = 0
            raise ConfigError(
                "no gradients were accumulated: after each loss.backward() call "
                "accumulate_grad(model), then prune"
            )
        return super().__call__(group)

    def element(self, parameter: nn.Parameter) -> Tensor | None:
        """Squared weight times mean squared gradient."""
        square = self._squares.get(parameter)
        return None if square is None else parameter.detach() ** 2 * square / self._passes


class HessianImportance(GroupHessianImportance):
    """The same as ``GroupHessianImportance``."""


class OBDCImportance(GroupMagnitudeImportance):
    """Half the squared loss change of a whole channel: structured Optimal Brain Damage.

    After each backward pass ``step()`` adds ``(sum of weight x gradient)^2`` per channel (the
    empirical Fisher form of Wang et al., "EigenDamage", ICML 2019, without its rotation).

    Args:
        group_reduction: As in ``GroupMagnitudeImportance``.
        normalizer: As there.
        bias: As there.
        target_types: As there.
        num_classes: Accepted; the labels of the loss are the user's.
    """

    def __init__(
        self,
        group_reduction: str | None = "mean",
        normalizer: str | Callable[[Tensor], Tensor] | None = "mean",
        bias: bool = False,
        target_types: Sequence[type[Any]] | None = None,
        num_classes: int = 100,
    ) -> None:
        super().__init__(2, group_reduction, normalizer, bias, target_types)
        self.num_classes = num_classes
        self._model: nn.Module | None = None
        self._clear_buffer()

    def _prepare_model(self, model: nn.Module, pruner: Any = None) -> None:
        """Say which model ``step`` looks at."""
        self._model = model

    def _rm_hooks(self, model: nn.Module) -> None:
        """Nothing to remove: gradients are read, not hooked."""

    def _clear_buffer(self) -> None:
        """Forget what was accumulated."""
        self._sums = WeakTensorKeyDictionary()  # of a list, one tensor per dimension

    @torch.no_grad()
    def step(self) -> None:
        """Add the gradients that the model holds now."""
        if self._model is None:
            raise ConfigError("call _prepare_model(model, pruner) before step()")
        for parameter in self._model.parameters():
            if parameter.grad is None:
                continue
            product = parameter.detach() * parameter.grad
            found = [
                product.movedim(d, 0).reshape(n, -1).sum(1) ** 2 / 2
                for d, n in enumerate(product.shape)
            ]
            known = self._sums.get(parameter, [torch.zeros_like(f) for f in found])
            self._sums[parameter] = [a + b for a, b in zip(known, found, strict=True)]

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """What was accumulated for a dimension."""
        if not len(self._sums):
            raise ConfigError("no gradients were accumulated: call step() after loss.backward()")
        found = self._sums.get(parameter)
        return None if found is None else found[dim]


class ActivationImportance(GroupMagnitudeImportance):
    """Mean absolute input of the layers that read a channel (Molchanov et al., ICLR 2017).

    Run the model inside ``with importance.compute_importance(model):`` first.
    """

    @contextmanager
    def compute_importance(self, model: nn.Module) -> Iterator[None]:
        """Measure the inputs of all convolutions and linear layers that run inside."""
        self._sums: dict[str, tuple[Tensor, int]] = {}
        handles = [
            module.register_forward_pre_hook(self._meter(name))
            for name, module in model.named_modules()
            if isinstance(module, self.target_types or TARGETS)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _meter(self, name: str) -> Callable[[nn.Module, Any], None]:
        def add(module: nn.Module, args: Any) -> None:
            x = args[0].detach()
            dim = 1 if isinstance(module, nn.modules.conv._ConvNd) and x.dim() > 2 else -1
            found = x.abs().float().movedim(dim, 0).flatten(1).mean(1).cpu()
            total, count = self._sums.get(name, (torch.zeros_like(found), 0))
            self._sums[name] = total + found, count + 1

        return add

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """Mean absolute input per channel, for weights that contract it."""
        if not math.prod(parameter.shape) or not getattr(self, "_sums", None):
            raise ConfigError(
                "no activations were measured: run the model on data inside "
                "`with importance.compute_importance(model):` before pruning"
            )
        if parameter.dim() < 2 or dim == 0:
            return None
        total, count = self._sums.get(item.dep.target.path, (None, 1))
        return None if total is None else total / count
