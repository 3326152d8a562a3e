"""Data for a model, by recipe: what BatchNorm, importance, int8 and parity are fed."""

from prune2deploy.calibration.batches import Batch, Batches, from_dataset, open_recipe
from prune2deploy.calibration.given import (
    IGNORED,
    are_classes,
    check_form,
    check_labels,
    filled,
    first,
    given_batches,
    notices,
    read,
    require,
    restarting,
    serves,
)
from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.calibration.recipe import PURPOSES, Recipe, load_recipe

__all__ = [
    "IGNORED",
    "PURPOSES",
    "Batch",
    "Batches",
    "Preprocessing",
    "Recipe",
    "are_classes",
    "check_form",
    "check_labels",
    "filled",
    "first",
    "from_dataset",
    "given_batches",
    "load_recipe",
    "notices",
    "open_recipe",
    "read",
    "require",
    "restarting",
    "serves",
]
