"""What pruning one layer means: the interface, and the layers that contract channels."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.surgery.slicing import sliced

Types = tuple[type[Any], ...]
Positions = np.ndarray[Any, np.dtype[np.int64]]


def kept(size: int, idxs: Sequence[int]) -> Positions:
    """The positions of a dimension that stay when ``idxs`` go.

    Raises:
        PruneError: an index is out of range, or nothing would stay.
    """
    gone = np.unique(np.asarray(list(idxs), dtype=np.int64))
    if len(gone) and not (gone[0] >= 0 and gone[-1] < size):
        raise PruneError(f"indices to prune must be in 0..{size - 1}, found {gone[[0, -1]]}")
    if len(gone) >= size:
        raise PruneError(f"all {size} channels would be removed; leave at least one")
    return np.setdiff1d(np.arange(size), gone)


def cut(owner: nn.Module, name: str, dim: int, idxs: Sequence[int]) -> None:
    """Remove positions of one dimension of a parameter or buffer; absent tensors are skipped."""
    table: Any = owner._parameters if name in owner._parameters else owner._buffers
    tensor = table.get(name)
    if tensor is not None:
        places: list[Any] = [None] * tensor.dim()
        places[dim] = kept(tensor.shape[dim], idxs)
        table[name] = sliced(tensor, places)


class BasePruningFunc(ABC):
    """How one type of layer loses channels; subclass it for layers of your own.

    Attributes:
        pruning_dim: The dimension that a bare parameter loses positions in.
        TARGET_MODULES: Layer types that it is meant for; ``None`` for any.
    """

    TARGET_MODULES: ClassVar[Types | None] = None

    def __init__(self, pruning_dim: int = 1) -> None:
        self.pruning_dim = pruning_dim

    @abstractmethod
    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove output channels; returns the layer."""

    @abstractmethod
    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove input channels; returns the layer."""

    @abstractmethod
    def get_out_channels(self, layer: Any) -> int | None:
        """Output channels that there are."""

    @abstractmethod
    def get_in_channels(self, layer: Any) -> int | None:
        """Input channels that there are."""

    def get_in_channel_groups(self, layer: Any) -> int:
        """Groups that the input channels form."""
        return 1

    def get_out_channel_groups(self, layer: Any) -> int:
        """Groups that the output channels form."""
        return 1


class ConvPruner(BasePruningFunc):
    """Convolutions, transposed ones too; with groups, each must lose equally many channels."""

    TARGET_MODULES = (nn.modules.conv._ConvNd,)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove filters."""
        blocks = _by_group(layer, idxs, layer.out_channels)
        if layer.transposed and layer.groups > 1:
            _cut_columns(layer, blocks)
        else:
            cut(layer, "weight", 1 if layer.transposed else 0, idxs)
        cut(layer, "bias", 0, idxs)
        layer.out_channels = sum(map(len, blocks))
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove the columns that read some input channels."""
        blocks = _by_group(layer, idxs, layer.in_channels)
        if layer.groups > 1 and not layer.transposed:
            _cut_columns(layer, blocks)
        else:
            cut(layer, "weight", 0 if layer.transposed else 1, idxs)
        layer.in_channels = sum(map(len, blocks))
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Filters."""
        return int(layer.out_channels)

    def get_in_channels(self, layer: Any) -> int:
        """Input channels of all groups."""
        return int(layer.in_channels)

    def get_in_channel_groups(self, layer: Any) -> int:
        """Groups."""
        return int(layer.groups)

    get_out_channel_groups = get_in_channel_groups


def _by_group(layer: Any, idxs: Sequence[int], channels: int) -> list[Positions]:
    """The channels that stay, numbered within each group of a convolution.

    Raises:
        PruneError: groups would keep different numbers of channels.
    """
    width = channels // layer.groups
    stay = kept(channels, idxs)
    blocks = [stay[stay // width == group] % width for group in range(layer.groups)]
    if len({len(block) for block in blocks}) > 1:
        raise PruneError(
            f"a convolution of {layer.groups} groups must lose equally many channels in each; "
            f"{[width - len(block) for block in blocks]} would go"
        )
    return blocks


def _cut_columns(layer: Any, blocks: Sequence[Positions]) -> None:
    """Dimension one of a grouped weight holds each group's own channels: cut group by group."""
    old = layer.weight
    rows = old.shape[0] // layer.groups
    parts = [slice(group * rows, (group + 1) * rows) for group in range(layer.groups)]

    def pick(tensor: torch.Tensor) -> torch.Tensor:
        columns = (torch.as_tensor(block, device=tensor.device) for block in blocks)
        return torch.cat(
            [tensor[part].index_select(1, c) for part, c in zip(parts, columns, strict=True)]
        )

    layer.weight = nn.Parameter(pick(old.detach()), requires_grad=old.requires_grad)
    if old.grad is not None:
        layer.weight.grad = pick(old.grad)


class DepthwiseConvPruner(ConvPruner):
    """Convolutions with as many groups as channels: a channel goes with its group."""

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove channels on both sides."""
        size = layer.out_channels
        cut(layer, "weight", 0, idxs)
        cut(layer, "bias", 0, idxs)
        left = len(kept(size, idxs))
        layer.out_channels = layer.in_channels = layer.groups = left
        return layer

    prune_in_channels = prune_out_channels

    def get_in_channel_groups(self, layer: Any) -> int:
        """Each channel by itself: no constraint."""
        return 1

    get_out_channel_groups = get_in_channel_groups


class LinearPruner(BasePruningFunc):
    """Linear layers."""

    TARGET_MODULES = (nn.Linear,)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove rows."""
        cut(layer, "weight", 0, idxs)
        cut(layer, "bias", 0, idxs)
        layer.out_features = layer.weight.shape[0]
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove columns."""
        cut(layer, "weight", 1, idxs)
        layer.in_features = layer.weight.shape[1]
        return layer

    def get_out_channels(self, layer: Any) -> int:
        """Rows."""
        return int(layer.out_features)

    def get_in_channels(self, layer: Any) -> int:
        """Columns."""
        return int(layer.in_features)
