"""Save and load a pruned model with its original code, without unpickling any code."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from prune2deploy.errors import ConfigError
from prune2deploy.pruning.rewrite import is_rewritten

SCHEMA = 1  # 1: tensors by name, plain attributes by module path

save = torch.save
load = torch.load


def state_dict(model: nn.Module) -> dict[str, Any]:
    """Tensors and plain attributes of a pruned model; loads with ``weights_only=True``.

    Raises:
        ConfigError: the model's forward was replaced, which tensors and attributes cannot tell.
    """
    if is_rewritten(model):
        raise ConfigError(
            "the forward of this model was replaced while pruning, because its code holds widths "
            "as constants; save pruner.pruning_history() with model.state_dict() and load both "
            "into a fresh model, or save the whole model"
        )
    return {
        "schema": SCHEMA,
        "tensors": model.state_dict(),
        "attributes": {name: _plain(module) for name, module in model.named_modules()},
    }


def load_state_dict(model: nn.Module, state_dict: dict[str, Any]) -> nn.Module:
    """Give a freshly built model the widths and weights of a pruned one, in place.

    Args:
        model: Built by the same code as the pruned one was, in its original widths.
        state_dict: What ``state_dict`` returned.

    Returns:
        The same model.

    Raises:
        ConfigError: the state is of something else.
    """
    if state_dict.get("schema") != SCHEMA:
        raise ConfigError(
            f"schema {state_dict.get('schema')!r} found, {SCHEMA} expected: pass what "
            "prune2deploy.pruning.state_dict returned"
        )
    modules = dict(model.named_modules())
    own, given = set(model.state_dict()), set(state_dict["tensors"])
    if own != given or not set(state_dict["attributes"]) <= set(modules):
        raise ConfigError(
            f"the state lacks {sorted(own - given)[:3]} and has {sorted(given - own)[:3]} that "
            "the model lacks; build the model as the pruned one was built"
        )
    for name, attributes in state_dict["attributes"].items():
        modules[name].__dict__.update(attributes)
    new: dict[int, torch.Tensor] = {}
    for name, tensor in state_dict["tensors"].items():
        _put(model, name, tensor, new)
    return model


def _put(model: nn.Module, name: str, tensor: torch.Tensor, new: dict[int, torch.Tensor]) -> None:
    """Replace a stored tensor; names that shared one share the new one."""
    path, _, leaf = name.rpartition(".")
    owner = model.get_submodule(path)
    table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
    old = table[leaf]
    if id(old) not in new:
        fresh = tensor.detach().clone().to(old.device)
        if isinstance(old, nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=old.requires_grad)
        new[id(old)] = new[id(fresh)] = fresh
    table[leaf] = new[id(old)]


def _plain(module: nn.Module) -> dict[str, Any]:
    return {
        name: value
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(_is_plain(item) for item in value)
    return value is None or type(value) in (int, float, bool, str)
