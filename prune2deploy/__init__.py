"""Prune a PyTorch model until its measured latency on the target device meets a budget.

The public names are loaded on first use, so that importing the package needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from prune2deploy.api import Result, load_pruned, prune, prune_to_budget, trace
    from prune2deploy.errors import (
        BackendError,
        BuildError,
        ConfigError,
        ExportError,
        MeasureError,
        MissingBackend,
        ModelError,
        ParityError,
        PlanError,
        Prune2DeployError,
        PruneError,
        TraceError,
    )
    from prune2deploy.extras import Extras
    from prune2deploy.graph.axes import Axis, Graph
    from prune2deploy.plan.plan import Plan

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "BackendError",
    "BuildError",
    "ConfigError",
    "ExportError",
    "Extras",
    "Graph",
    "MeasureError",
    "MissingBackend",
    "ModelError",
    "ParityError",
    "Plan",
    "PlanError",
    "Prune2DeployError",
    "PruneError",
    "Result",
    "TraceError",
    "load_pruned",
    "prune",
    "prune_to_budget",
    "trace",
]

_HOME = {
    "Axis": "prune2deploy.graph.axes",
    "Extras": "prune2deploy.extras",
    "Graph": "prune2deploy.graph.axes",
    "Plan": "prune2deploy.plan.plan",
    "Result": "prune2deploy.api",
    "load_pruned": "prune2deploy.api",
    "prune": "prune2deploy.api",
    "prune_to_budget": "prune2deploy.api",
    "trace": "prune2deploy.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = importlib.import_module(_HOME.get(name, "prune2deploy.errors"))
    return getattr(home, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
