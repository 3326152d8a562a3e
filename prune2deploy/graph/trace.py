"""The stage: a module and example inputs go in, the frozen graph comes out."""

from __future__ import annotations

from typing import Any

from torch import nn

from prune2deploy.graph.axes import Graph
from prune2deploy.graph.build import build
from prune2deploy.graph.calling import Forward
from prune2deploy.graph.record import record


def trace(model: nn.Module, example_inputs: Any, *, forward_fn: Forward | None = None) -> Graph:
    """Find every axis of a model from one forward pass.

    Args:
        model: Any module; wrappers of ``torch.compile`` and ``DistributedDataParallel`` are
            looked through. It runs once in evaluation mode and is left as it was. The pass runs
            on shapes, without arithmetic, and on values where the code looks at some.
        example_inputs: One tensor, a tuple of positional arguments, or a dict of keywords.
        forward_fn: ``forward_fn(model, example_inputs)`` where calling the model takes more.

    Returns:
        The graph: ``.axes`` (size, members, reason where frozen), ``.layers``, ``.blocks``.

    Raises:
        TraceError: the forward pass fails, returns no tensor, or has nothing to prune.
    """
    return build(record(unwrap(model), example_inputs, forward_fn))


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``."""
    wrappers = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while True:
        if isinstance(model, wrappers):
            model = model.module
        elif "_orig_mod" in model._modules:
            inner = model._modules["_orig_mod"]
            assert inner is not None
            model = inner
        else:
            return model
