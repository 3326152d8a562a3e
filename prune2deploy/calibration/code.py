"""Datasets that the user's own code makes: ``callable = "my_data:dataset"`` in a recipe.

In: a recipe and the name. Out: what the function returns.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

from prune2deploy.calibration.recipe import Recipe
from prune2deploy.errors import ConfigError, MissingBackend
from prune2deploy.places import importable


def dataset(recipe: Recipe, name: str) -> Any:
    """Call the function ``module:function``, whose module lies beside the recipe or is importable.

    Raises:
        ConfigError: There is no such function, it fails, or another module of this name has been
            imported from elsewhere.
    """
    where = f"{recipe.path}:options.callable"
    place, _, attribute = name.rpartition(":")
    beside = recipe.path.parent
    try:
        with importable(beside):
            module = importlib.import_module(place)
            _check_place(module, beside / f"{place.replace('.', '/')}.py", where)
            return _attribute(module, attribute, where)()
    except (ConfigError, MissingBackend):
        raise
    except Exception as error:
        raise ConfigError(
            f"{where}: {name!r} failed: {type(error).__name__}: {error}; "
            "expected a callable without arguments that returns a dataset with len() and indexing"
        ) from error


def _attribute(module: ModuleType, name: str, where: str) -> Any:
    if name not in vars(module):
        near = ", ".join(difflib.get_close_matches(name, list(vars(module)), n=3)) or "none"
        raise ConfigError(f"{where}: {module.__name__!r} has no {name!r}; nearest: {near}")
    return vars(module)[name]


def _check_place(module: ModuleType, beside: Path, where: str) -> None:
    """A process holds one module of each name: the one beside the recipe must be that."""
    found = getattr(module, "__file__", None)
    if beside.is_file() and (found is None or not beside.samefile(found)):
        raise ConfigError(
            f"{where}: found a module {module.__name__!r} that was imported before, from "
            f"{found or 'Python itself'}, expected {beside}; give that file another name"
        )
