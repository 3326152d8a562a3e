"""Turns what callers give (layers, pruning functions, forward functions) into what graphs need."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import run, tensors_in
from prune2deploy.pruning.group import PruningFn
from prune2deploy.pruning.layers import BasePruningFunc


def members_of(layers: Iterable[Any], model: nn.Module | None = None) -> set[int]:
    """Identities of modules and all inside them, and of parameters given by themselves.

    A layer type stands for all layers of that type in ``model``.
    """
    found: set[int] = set()
    for layer in layers:
        found.add(id(layer))
        if isinstance(layer, nn.Module):
            found.update(id(part) for part in layer.modules())
        elif isinstance(layer, type) and model is not None:
            found |= members_of(part for part in model.modules() if isinstance(part, layer))
    return found


def owner_of(fn: PruningFn) -> BasePruningFunc:
    """The object whose method a pruning function is."""
    owner = getattr(fn, "__self__", None)
    if not isinstance(owner, BasePruningFunc):
        raise PruneError(
            f"{fn!r} is no pruning function; expected one such as prune_conv_out_channels, or the "
            "prune_out_channels of a BasePruningFunc"
        )
    return owner


def forward_of(
    forward_fn: Callable[..., Any] | None, output_transform: Callable[..., Any] | None
) -> Callable[..., Any] | None:
    """How to run the model so that its own outputs are seen, whatever is made of them after."""
    if forward_fn is None and output_transform is None:
        return None

    def forward(model: nn.Module, example: Any) -> Any:
        seen: list[Any] = []
        handle = model.register_forward_hook(lambda module, args, result: seen.append(result))
        try:
            result = run(model, example, forward_fn)
        finally:
            handle.remove()
        outputs = [found for found in seen if next(tensors_in(found), None) is not None]
        if not outputs and output_transform is not None:
            result = output_transform(result)
        return (outputs, result) if forward_fn is not None else result

    return forward
