"""The pruners, as ``tp.pruner.algorithms``."""

from __future__ import annotations

from prune2deploy.pruning import options as scheduler
from prune2deploy.pruning.pruner import BasePruner, MagnitudePruner, MetaPruner
from prune2deploy.pruning.sparse import BNScalePruner, GroupNormPruner, GrowingRegPruner

__all__ = [
    "BNScalePruner",
    "BasePruner",
    "GroupNormPruner",
    "GrowingRegPruner",
    "MagnitudePruner",
    "MetaPruner",
    "scheduler",
]
