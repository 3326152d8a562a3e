"""The interface that users of Torch-Pruning know, over axes: ``import prune2deploy.pruning as tp``.

Everything here changes the caller's model in place. ``prune2deploy.prune`` and the command line
work on copies and meet a latency budget; ``docs/pruning.md`` tells how to move over.
"""

from __future__ import annotations

from prune2deploy.pruning import function, importance, ops, utils
from prune2deploy.pruning import pruners as pruner
from prune2deploy.pruning.dependency import DependencyGraph
from prune2deploy.pruning.function import *  # noqa: F403
from prune2deploy.pruning.group import Dependency, Group, Node
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
    "Node",
    "function",
    "importance",
    "load",
    "load_state_dict",
    "ops",
    "pruner",
    "save",
    "state_dict",
    "utils",
]
__all__ += function.__all__
