"""Importance of a group's channels, under the names that users of Torch-Pruning know.

An importance is a function of a group: one score per position of ``group[0].idxs``, higher means
keep, ``None`` where the group has nothing to score. The loop of this package uses
``prune2deploy.importance`` instead, which scores axes.
"""

from __future__ import annotations

from prune2deploy.pruning.gradients import (
    ActivationImportance,
    GroupHessianImportance,
    GroupTaylorImportance,
    HessianImportance,
    OBDCImportance,
    TaylorImportance,
)
from prune2deploy.pruning.magnitude import (
    BNScaleImportance,
    FPGMImportance,
    GroupMagnitudeImportance,
    Importance,
    LAMPImportance,
    MagnitudeImportance,
    RandomImportance,
)

__all__ = [
    "ActivationImportance",
    "BNScaleImportance",
    "FPGMImportance",
    "GroupHessianImportance",
    "GroupMagnitudeImportance",
    "GroupTaylorImportance",
    "HessianImportance",
    "Importance",
    "LAMPImportance",
    "MagnitudeImportance",
    "OBDCImportance",
    "RandomImportance",
    "TaylorImportance",
]
