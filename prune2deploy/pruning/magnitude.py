"""Importance by weights: the base of all, magnitude, batch normalisation scales, distances.

Scores of each layer are added up per root position, combined over layers (``group_reduction``)
and scaled (``normalizer``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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
        modules = group._DG.modules
        for item in items:
            for name, dim in item.tensors:
                path, _, leaf = name.rpartition(".")
                parameter = modules[path]._parameters.get(leaf)
                if parameter is None or not (self.bias or not name.endswith("bias")):
                    continue
                found = self.positions(item, parameter, dim)
                if found is not None and len(found) >= len(item.idxs) > 0:
                    values = found.float().cpu()[torch.tensor(item.idxs)]
                    root = torch.tensor(item.root_idxs)
                    yield torch.zeros(len(group[0].idxs), dtype=torch.float32).index_add_(
                        0, root, values
                    )

    def positions(self, item: Item, parameter: nn.Parameter, dim: int) -> Tensor | None:
        """One number per position of a dimension; ``None`` where there is nothing to go by."""
        values = self.element(parameter)
        if values is None:
            return None
        return values.movedim(dim, 0).reshape(values.shape[dim], -1).sum(1)

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
