"""Pruners that train sparsely first: each adds to the gradients between backward and step.

loss.backward()
pruner.regularize(model)
optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.pruning.group import Group
from prune2deploy.pruning.magnitude import BATCHNORMS, TARGETS, GroupMagnitudeImportance
from prune2deploy.pruning.pruner import BasePruner, ImportanceFn


@dataclass(frozen=True, eq=False)
class Piece:
    """Part of a parameter that goes with a group's channels.

    Attributes:
        layer: The module that owns it.
        parameter: The parameter; it has a gradient.
        dim: The dimension that channels lie in.
        idxs: Positions there.
        root_idxs: Which of the group's root positions each goes with.
    """

    layer: Any
    parameter: nn.Parameter
    dim: int
    idxs: Tensor
    root_idxs: Tensor

    @property
    def weight(self) -> Tensor:
        """The weights at the positions."""
        return self.parameter.detach().index_select(self.dim, self.idxs)

    def add(self, gradient: Tensor) -> None:
        """Add to the gradient at the positions."""
        assert self.parameter.grad is not None
        self.parameter.grad.index_add_(self.dim, self.idxs, gradient)

    def spread(self, per_root: Tensor) -> Tensor:
        """A factor per root position, shaped to multiply ``weight``."""
        factor = per_root.to(self.idxs.device)[self.root_idxs]
        shape = [1] * self.parameter.dim()
        shape[self.dim] = -1
        return factor.reshape(shape).to(self.parameter.dtype)


class _SparsePruner(BasePruner):
    """A pruner that looks at its groups again whenever widths changed."""

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: ImportanceFn,
        *given: Any,
        **options: Any,
    ) -> None:
        super().__init__(model, example_inputs, importance, *given, **options)
        self.update_regularizer()

    def update_regularizer(self) -> None:
        """Look at the groups of the model as it is now."""
        ignored = self.ignored_layers
        self._groups = list(self.DG.get_all_groups(ignored, self.root_module_types))

    def _pieces(self, group: Group, bias: bool) -> Iterator[Piece]:
        parameters = dict(self.DG.model.named_parameters(remove_duplicate=False))
        for item in group:
            if not isinstance(item.dep.layer, TARGETS) or id(item.dep.layer) in self._ignored:
                continue
            for name, dim in item.tensors:
                parameter = parameters.get(name)
                if parameter is None or parameter.grad is None:
                    continue
                if name.endswith("bias") and not bias:
                    continue
                device = parameter.device
                idxs = torch.tensor(item.idxs, device=device)
                roots = torch.tensor(item.root_idxs, device=device)
                yield Piece(item.dep.layer, parameter, dim, idxs, roots)


class BNScalePruner(_SparsePruner):
    """Shrinks the scales of batch normalisation (Liu et al., "Network Slimming", ICCV 2017).

    Args:
        model: As in ``BasePruner``.
        example_inputs: As there.
        importance: As there.
        reg: Strength.
        group_lasso: Shrink the scales of a group together instead of one by one.
        given: As there.
        options: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: ImportanceFn,
        reg: float = 1e-5,
        group_lasso: bool = False,
        *given: Any,
        **options: Any,
    ) -> None:
        self.reg = reg
        self.group_lasso = group_lasso
        self._norm = GroupMagnitudeImportance(2, "mean", None, target_types=BATCHNORMS)
        super().__init__(model, example_inputs, importance, *given, **options)

    @torch.no_grad()
    def regularize(self, model: nn.Module, reg: float | None = None, bias: bool = False) -> None:
        """Add ``reg * sign(scale)``, or ``reg * scale / norm of the group's scales``."""
        strength = self.reg if reg is None else reg
        if not self.group_lasso:
            for module in model.modules():
                if isinstance(module, BATCHNORMS) and id(module) not in self._ignored:
                    scale = module.weight
                    if scale is not None and scale.grad is not None:
                        scale.grad.add_(strength * scale.sign())
            return
        for group in self._groups:
            square = self._norm(group)
            if square is None:
                continue
            factor = strength / (square + 1e-9).sqrt()
            for piece in self._pieces(group, bias):
                if isinstance(piece.layer, BATCHNORMS):
                    piece.add(piece.spread(factor) * piece.weight)


class GroupNormPruner(_SparsePruner):
    """Group-sparse training (Fang et al., "DepGraph", CVPR 2023).

    Channels are pulled to zero as a whole, the less important ones up to ``2**alpha`` times as
    hard as the most important.

    Args:
        model: As in ``BasePruner``.
        example_inputs: As there.
        importance: As there; its square root measures a group's channels.
        reg: Strength.
        alpha: See above.
        given: As there.
        options: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: ImportanceFn,
        reg: float = 1e-4,
        alpha: float = 4,
        *given: Any,
        **options: Any,
    ) -> None:
        self.reg = reg
        self.alpha = alpha
        super().__init__(model, example_inputs, importance, *given, **options)

    @torch.no_grad()
    def regularize(self, model: nn.Module, alpha: float | None = None, bias: bool = False) -> None:
        """Add ``reg * gamma * weight`` with gamma from 1 (best) to ``alpha`` (worst channel)."""
        base = 2.0**self.alpha if alpha is None else alpha
        for group in self._groups:
            scores = self.estimate_importance(group)
            if scores is None:
                continue
            size = scores.clamp_min(0).sqrt()
            span = size.max() - size.min()
            if not torch.isfinite(span):
                continue
            place = (size.max() - size) / span if span > 0 else torch.zeros_like(size)
            factor = self.reg * base**place
            for piece in self._pieces(group, bias):
                piece.add(piece.spread(factor) * piece.weight)


class GrowingRegPruner(_SparsePruner):
    """Regularisation that grows where channels matter least (Wang et al., ICLR 2021).

    Args:
        model: As in ``BasePruner``.
        example_inputs: As there.
        importance: As there.
        reg: Strength at first.
        delta_reg: What the least important channel gains with each ``update_reg``.
        given: As there.
        options: As there.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Any,
        importance: ImportanceFn,
        reg: float = 1e-5,
        delta_reg: float = 1e-5,
        *given: Any,
        **options: Any,
    ) -> None:
        self.base_reg = reg
        self.delta_reg = delta_reg
        super().__init__(model, example_inputs, importance, *given, **options)

    def update_regularizer(self) -> None:
        """Begin again with the first strength everywhere."""
        super().update_regularizer()
        self.group_reg = {
            group: torch.full((len(group[0].idxs),), self.base_reg, dtype=torch.float32)
            for group in self._groups
        }

    @torch.no_grad()
    def update_reg(self) -> None:
        """Let the strength grow, most for the least important channels."""
        for group in self._groups:
            scores = self.estimate_importance(group)
            if scores is not None:
                span = scores.max() - scores.min() + 1e-8
                self.group_reg[group] += self.delta_reg * ((scores.max() - scores) / span).cpu()

    @torch.no_grad()
    def regularize(self, model: nn.Module, bias: bool = False) -> None:
        """Add ``strength * weight`` per channel."""
        for group in self._groups:
            for piece in self._pieces(group, bias):
                piece.add(piece.spread(self.group_reg[group]) * piece.weight)
