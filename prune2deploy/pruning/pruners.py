"""All pruners in one place, as ``tp.pruner``."""

from __future__ import annotations

from prune2deploy.pruning import algorithms, function, importance
from prune2deploy.pruning.algorithms import (
    BasePruner,
    BNScalePruner,
    GroupNormPruner,
    GrowingRegPruner,
    MagnitudePruner,
    MetaPruner,
)
from prune2deploy.pruning.function import *  # noqa: F403
from prune2deploy.pruning.layers import BasePruningFunc
from prune2deploy.pruning.options import linear_scheduler

__all__ = [
    "BNScalePruner",
    "BasePruner",
    "BasePruningFunc",
    "GroupNormPruner",
    "GrowingRegPruner",
    "MagnitudePruner",
    "MetaPruner",
    "algorithms",
    "function",
    "importance",
    "linear_scheduler",
]
__all__ += function.__all__
