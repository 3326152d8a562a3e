"""Importance by data: gradients that the caller made, or activations that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prune2deploy.errors import ConfigError
from prune2deploy.pruning.group import Group, Item
from prune2deploy.pruning.magnitude import TARGETS, GroupMagnitudeImportance


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
        """Set the model whose gradients ``step`` reads."""
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
