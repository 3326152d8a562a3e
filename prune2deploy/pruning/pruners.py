"""All pruners in one place, as ``tp.pruner``."""

from __future__ import annotations

from prune2deploy.pruning import function, importance
from prune2deploy.pruning.layers import BasePruningFunc
from prune2deploy.pruning.options import linear_scheduler
from prune2deploy.pruning.pruner import BasePruner, MagnitudePruner, MetaPruner
from prune2deploy.pruning.sparse import BNScalePruner, GroupNormPruner, GrowingRegPruner

__all__ = [
    "BNScalePruner",
    "BasePruner",
    "BasePruningFunc",
    "GroupNormPruner",
    "GrowingRegPruner",
    "MagnitudePruner",
    "MetaPruner",
    "function",
    "importance",
    "linear_scheduler",
]
