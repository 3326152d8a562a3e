"""Replace a module's forward by the operators that were recorded, in place.

The captured graph (``prune2deploy.surgery.capture``) is written around the caller's own module, and
its Python source becomes the instance's ``forward``. The source is text that refers to torch and to
this package alone, so the module can still be copied, pickled, traced and exported.
"""

from __future__ import annotations

import importlib
import inspect
import types
from typing import Any

from torch import nn

from prune2deploy.graph.axes import Graph
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture


class Rewritten:
    """A ``forward`` made from source text, for one module.

    Attributes:
        source: A Python function ``forward(self, ...)``.
        names: What it refers to: modules by name, other objects as they are.
        owner: The module that it runs for.
    """

    def __init__(self, source: str, names: dict[str, Any]) -> None:
        self.source = source
        self.names = names
        self.owner: nn.Module | None = None
        scope = {name: _resolved(entry) for name, entry in names.items()}
        exec(source, scope)  # noqa: S102  written by torch.fx from recorded operators
        self._function: Any = scope["forward"]
        signature = inspect.signature(self._function)
        self.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run for the module."""
        return self._function(self.owner, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Rewritten, (self.source, self.names), {"owner": self.owner}


def _resolved(entry: Any) -> Any:
    return importlib.import_module(entry.module) if isinstance(entry, _Module) else entry


class _Module:
    """Stands for a Python module, which cannot be pickled itself."""

    def __init__(self, module: str) -> None:
        self.module = module


def is_rewritten(model: nn.Module) -> bool:
    """Whether the module's forward was replaced."""
    return isinstance(model.__dict__.get("forward"), Rewritten)


def rewrite(model: nn.Module, graph: Graph) -> None:
    """Let ``model`` run the operators of ``graph``, in the widths of its axes.

    Raises:
        PruneError: the operators cannot be written down.
    """
    model.__dict__.pop("forward", None)
    captured = capture(model, model, graph, Plan({}))
    code = captured.graph.python_code("self")
    names = {
        name: _Module(value.__name__) if isinstance(value, types.ModuleType) else value
        for name, value in code.globals.items()
    }
    forward = Rewritten(code.src, names)
    forward.owner = model
    model.__dict__["forward"] = forward
