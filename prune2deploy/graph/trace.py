"""The stage: a module and example inputs go in, the frozen graph comes out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from prune2deploy.errors import TraceError
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.build import build
from prune2deploy.graph.calling import Forward, stored_tensors, tensors_in
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
        TraceError: the forward pass fails, returns no tensor, or has nothing to prune; or the
            model is TorchScript, or has parameters without a shape.
    """
    _require_content(example_inputs)
    return build(record(_plain(unwrap(model)), example_inputs, forward_fn))


def _require_content(example: Any) -> None:
    """Raise TraceError where example inputs are nested tensors, or all of them empty."""
    tensors = list(tensors_in(example))
    if any(tensor.is_nested for tensor in tensors):
        raise TraceError(
            "example inputs: found a nested tensor, expected tensors of one shape each; give one "
            "that is padded, as by torch.nested.to_padded_tensor"
        )
    if tensors and not any(tensor.numel() for tensor in tensors):
        raise TraceError(
            f"example inputs: found shapes {[tuple(t.shape) for t in tensors]}, which hold no "
            "numbers, expected at least one sample"
        )


def _plain(model: nn.Module) -> nn.Module:
    """Return a module whose layers can be looked into.

    Raises:
        TraceError: One of them is compiled TorchScript, or a parameter has no shape yet.
    """
    for name, tensor in stored_tensors(model):
        if is_lazy(tensor):
            raise TraceError(
                f"{name} of the model has no shape before the first call (a lazy module of "
                "torch.nn); run the model once on example inputs, and then trace it"
            )
    for name, part in model.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            raise TraceError(
                f"{f'module {name!r} of the model' if name else 'the model'} is TorchScript (of "
                "torch.jit.script, torch.jit.trace or torch.jit.load), whose layers are compiled "
                "and cannot be cut; give the torch.nn.Module that it was made of, which its "
                "state_dict() fills"
            )
    return model


_INSTEAD = (
    (torch.export.ExportedProgram, "; give the one that its module() returns"),
    (Mapping, "; load the state dict into the module that it is of"),
    (type, "; make an instance of it"),
)


def mistaken(model: object) -> str:
    """What was found in place of a module, and what to give instead."""
    told = next((told for kind, told in _INSTEAD if isinstance(model, kind)), "")
    return f"found {type(model).__name__}, expected a torch.nn.Module{told}"


def unwrap(model: nn.Module) -> nn.Module:
    """The module inside ``torch.compile``, ``DataParallel`` or ``DistributedDataParallel``.

    Raises:
        TraceError: It is no module.
    """
    if not isinstance(model, nn.Module):
        raise TraceError(f"model: {mistaken(model)}")
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
