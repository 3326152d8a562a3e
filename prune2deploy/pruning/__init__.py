"""The interface that users of Torch-Pruning know, over axes: ``import prune2deploy.pruning as tp``.

Everything here changes the caller's model in place. ``prune2deploy.prune`` and the command line
work on copies and meet a latency budget; ``docs/pruning.md`` tells how to move over.
"""

from __future__ import annotations

from prune2deploy.pruning import counting as utils
from prune2deploy.pruning import function, importance
from prune2deploy.pruning import pruners as pruner
from prune2deploy.pruning.dependency import DependencyGraph
from prune2deploy.pruning.function import (
    prune_batchnorm_in_channels,
    prune_batchnorm_out_channels,
    prune_conv_in_channels,
    prune_conv_out_channels,
    prune_depthwise_conv_in_channels,
    prune_depthwise_conv_out_channels,
    prune_embedding_in_channels,
    prune_embedding_out_channels,
    prune_groupnorm_in_channels,
    prune_groupnorm_out_channels,
    prune_instancenorm_in_channels,
    prune_instancenorm_out_channels,
    prune_layernorm_in_channels,
    prune_layernorm_out_channels,
    prune_linear_in_channels,
    prune_linear_out_channels,
    prune_lstm_in_channels,
    prune_lstm_out_channels,
    prune_multihead_attention_in_channels,
    prune_multihead_attention_out_channels,
    prune_parameter_in_channels,
    prune_parameter_out_channels,
    prune_prelu_in_channels,
    prune_prelu_out_channels,
)
from prune2deploy.pruning.group import Dependency, Group
from prune2deploy.pruning.layers import BasePruningFunc
from prune2deploy.pruning.pruners import (
    BasePruner,
    BNScalePruner,
    GroupNormPruner,
    GrowingRegPruner,
    MagnitudePruner,
    MetaPruner,
)
from prune2deploy.pruning.serialization import load, load_state_dict, save, state_dict

__all__ = [
    "BNScalePruner",
    "BasePruner",
    "BasePruningFunc",
    "Dependency",
    "DependencyGraph",
    "Group",
    "GroupNormPruner",
    "GrowingRegPruner",
    "MagnitudePruner",
    "MetaPruner",
    "function",
    "importance",
    "load",
    "load_state_dict",
    "prune_batchnorm_in_channels",
    "prune_batchnorm_out_channels",
    "prune_conv_in_channels",
    "prune_conv_out_channels",
    "prune_depthwise_conv_in_channels",
    "prune_depthwise_conv_out_channels",
    "prune_embedding_in_channels",
    "prune_embedding_out_channels",
    "prune_groupnorm_in_channels",
    "prune_groupnorm_out_channels",
    "prune_instancenorm_in_channels",
    "prune_instancenorm_out_channels",
    "prune_layernorm_in_channels",
    "prune_layernorm_out_channels",
    "prune_linear_in_channels",
    "prune_linear_out_channels",
    "prune_lstm_in_channels",
    "prune_lstm_out_channels",
    "prune_multihead_attention_in_channels",
    "prune_multihead_attention_out_channels",
    "prune_parameter_in_channels",
    "prune_parameter_out_channels",
    "prune_prelu_in_channels",
    "prune_prelu_out_channels",
    "pruner",
    "save",
    "state_dict",
    "utils",
]
