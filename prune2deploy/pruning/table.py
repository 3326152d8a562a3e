"""Layer type → how it loses channels, in one table; and where a layer keeps its channels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from prune2deploy.pruning import function
from prune2deploy.pruning.layers import BasePruningFunc

TABLE: tuple[tuple[type[nn.Module], BasePruningFunc], ...] = (
    (nn.modules.conv._ConvNd, function.CONV),
    (nn.Linear, function.LINEAR),
    (nn.modules.instancenorm._InstanceNorm, function.INSTANCENORM),
    (nn.modules.batchnorm._BatchNorm, function.BATCHNORM),
    (nn.LayerNorm, function.LAYERNORM),
    (nn.RMSNorm, function.LAYERNORM),
    (nn.GroupNorm, function.GROUPNORM),
    (nn.PReLU, function.PRELU),
    (nn.Embedding, function.EMBEDDING),
    (nn.EmbeddingBag, function.EMBEDDING),
    (nn.MultiheadAttention, function.MULTIHEAD_ATTENTION),
    (nn.LSTM, function.LSTM),
    (nn.GRU, function.LSTM),
)

Customized = Mapping[Any, BasePruningFunc]


def customized_pruner(module: Any, customized: Customized) -> BasePruningFunc | None:
    """The functions of the user's own that prune a module, by instance or type."""
    for key, pruner in customized.items():
        if module is key or (isinstance(key, type) and isinstance(module, key)):
            return pruner
    return None


def pruner_of(module: Any, customized: Customized) -> BasePruningFunc | None:
    """The functions that prune a module: the user's own for the instance or type, else ours."""
    own = customized_pruner(module, customized)
    if own is not None:
        return own
    if isinstance(module, nn.Parameter):
        return function.PARAMETER
    if is_depthwise(module):
        return function.DEPTHWISE_CONV
    return next((pruner for kind, pruner in TABLE if isinstance(module, kind)), None)


def is_depthwise(module: Any) -> bool:
    """Whether a convolution has one group per channel; one channel alone is no depthwise one."""
    return (
        isinstance(module, nn.modules.conv._ConvNd)
        and module.groups == module.in_channels == module.out_channels
        and module.groups > 1
    )


def place(module: Any, *, out: bool) -> tuple[str, int] | None:  # noqa: PLR0911  one per type
    """The parameter and dimension that hold a layer's output or input channels, if one does.

    ``None`` where no single dimension lists them all: inputs of grouped convolutions, layers
    without parameters, layers of unknown type.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        first = out is not module.transposed
        grouped = module.groups > 1 and not is_depthwise(module) and not first
        return None if grouped else ("weight", 0 if first or is_depthwise(module) else 1)
    if isinstance(module, nn.Linear):
        return "weight", 0 if out else 1
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return "weight", 1
    if isinstance(module, nn.MultiheadAttention):
        return ("out_proj.weight", 0) if out else ("in_proj_weight", 1)
    if isinstance(module, nn.LayerNorm | nn.RMSNorm):
        return ("weight", -1) if module.weight is not None else None
    norms = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
    if isinstance(module, norms):
        name = "weight" if module.weight is not None else "running_mean"
        return (name, 0) if getattr(module, name, None) is not None else None
    return None


def channel_dim(module: Any, rank: int) -> int:
    """The dimension of an activation that a layer treats as channels."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return rank - len(module.kernel_size) - 1
    first = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.PReLU)
    return min(1, rank - 1) if isinstance(module, first) else rank - 1
