"""Weights from a file into a model, without running anything that the file holds.

In: a model and the path of a state dict (``torch.save`` or safetensors), plain or wrapped the ways
training scripts wrap it. Out: the model, filled.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.checkpoint import OBJECTS, contents

# What deploys is the moving average of the weights, where a training kept one. No "ema_state_dict":
# mmengine keeps the last weights there, and their average under "state_dict".
AVERAGED = ("state_dict_ema", "model_ema", "ema", "ema_model", "params_ema")
WRAPPERS = (*AVERAGED, "state_dict", "model_state_dict", "model", "module", "net", "params")
_OPTIONAL = ("num_batches_tracked", "n_averaged")  # counters, of BatchNorm and of averages


@dataclass(frozen=True, eq=False)
class _Found:
    """A state dict in a file: where it lies, and what the user should know of that."""

    state: Mapping[str, Tensor]
    keys: tuple[str, ...] = ()
    notices: tuple[str, ...] = ()


def load_weights(module: nn.Module, path: Path) -> tuple[str, ...]:
    """Fill ``module`` with the state dict in ``path``, in place.

    Args:
        module: Gets every parameter and buffer; all must be in the file with equal shapes.
        path: A ``.safetensors`` file, or anything that ``torch.save`` wrote from tensors.

    Returns:
        What the user should know, such as that averaged weights were taken.

    Raises:
        ModelError: The file is missing, truncated, not a state dict, holds pickled code, or
            belongs to another model.
        MissingBackend: A ``.safetensors`` file without the safetensors library.
    """
    found = _read(path)
    own = module.state_dict()
    state = _with_ties(_without_prefix(found.state, own.keys()), module)
    _check_fits(own, state, " under ".join([repr(str(path)), *map(repr, reversed(found.keys))]))
    module.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})
    return found.notices


def _read(path: Path) -> _Found:
    """Read the state dict in a file; a wrapping such as ``{"state_dict": …}`` is opened."""
    if not path.is_file():
        raise ModelError(f"weights: no file {str(path)!r} found; expected a state dict")
    if path.suffix == ".safetensors":
        return _Found(_read_safetensors(path))
    found = contents(path)
    state = _unwrapped(found.value)
    if state is not None:
        return state
    refused = ", which are refused because loading them can run code" * (found.kind == OBJECTS)
    raise ModelError(
        f"weights: {str(path)!r} holds {found.text}{refused}; expected a state dict (names to "
        f"tensors); save the tensors alone with {found.state}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    except ImportError as error:
        raise MissingBackend(
            f"weights {str(path)!r} need safetensors, which cannot be imported ({error}); "
            "install it with: pip install safetensors"
        ) from error
    try:
        return dict(load_file(path))
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise ModelError(
            f"weights: {str(path)!r} ({path.stat().st_size} bytes) is truncated or not a "
            f"safetensors file; copy it again. {error}"
        ) from error


def _unwrapped(found: Any) -> _Found | None:
    """Open ``{"state_dict": …}`` and the like, as often as they are nested; None: no tensors."""
    if not isinstance(found, Mapping):
        return None
    inner = {key: found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)}
    if not inner:
        tensors = {key: held for key, held in found.items() if isinstance(held, Tensor)}
        named = tensors and all(isinstance(key, str) for key in tensors)
        return _Found(tensors) if named else None
    opened = {key: _unwrapped(held) for key, held in inner.items()}
    key, state = next(((k, one) for k, one in opened.items() if one is not None), ("", None))
    if state is None:
        return None
    passed = [one for one in inner if opened[one] is None and inner[one]]
    told = tuple(averaged(key, [one for one in opened if one != key], passed))
    return _Found(state.state, (key, *state.keys), (*told, *state.notices))


def averaged(key: str, others: Iterable[str], passed: Iterable[str] = ()) -> Iterable[str]:
    """Say which weights are taken where a file holds averaged ones and others.

    Args:
        key: Of those that are taken.
        others: Keys of all other weights.
        passed: Those of them that are no state dict.
    """
    left = [one for one in others if one not in AVERAGED]
    if key in AVERAGED and left:
        yield (
            f"weights are the moving average that the file keeps under {key!r}, not those under "
            f"{left[0]!r}; for these, give a file that holds them alone"
        )
    unread = [one for one in passed if one in AVERAGED]
    if key not in AVERAGED and unread:
        yield (
            f"weights are those under {key!r} of the file: what it keeps under {unread[0]!r} is no "
            "state dict (names to tensors) of averaged ones"
        )


def _without_prefix(state: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    """Strip what wrappers put before names: the prefix behind which most names are the model's.

    DataParallel puts ``module.`` there, torch.compile ``_orig_mod.``, a LightningModule the name of
    the attribute that holds the network.
    """
    wanted = set(names)
    found = Counter(
        key[:at]
        for key in state
        for at in (0, *(dot.end() for dot in re.finditer(r"\.", key)))
        if key[at:] in wanted
    )
    prefix = max(found, key=lambda one: (found[one], -len(one)), default="")
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _with_ties(state: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Add the other names of tensors that ``module`` stores under several.

    Files of safetensors hold such a tensor once.
    """
    own = module.state_dict(keep_vars=True)
    given = {id(own[name]): tensor for name, tensor in state.items() if name in own}
    ties = {name: given[id(held)] for name, held in own.items() if id(held) in given}
    return {**ties, **state}


def _kind(tensor: Tensor) -> str:
    """What sort of numbers a tensor holds; one sort cannot stand for another."""
    if tensor.is_quantized:
        return "quantised numbers"
    if tensor.layout != torch.strided:
        return "sparse numbers"
    if tensor.is_complex():
        return "complex numbers"
    return "fractions" if tensor.is_floating_point() else "whole numbers"


def _check_fits(own: Mapping[str, Any], state: Mapping[str, Tensor], place: str) -> None:
    """Raise ModelError at the first name that is missing, unexpected, of other shape or kind."""
    needed = [name for name in own if isinstance(own[name], Tensor)]
    same = [n for n in needed if n in state and state[n].shape == own[n].shape]
    problem = ""
    for name in needed:
        if name in state and state[name].shape != own[name].shape:
            problem = (
                f"{name!r} has shape {tuple(state[name].shape)} in the file and "
                f"{tuple(own[name].shape)} in the model"
            )
        elif name in state and _kind(state[name]) != _kind(own[name]):
            there, here = _kind(state[name]), _kind(own[name])
            problem = f"{name!r} holds {there} in the file and {here} in the model"
        elif name not in state and not name.endswith(_OPTIONAL):
            problem = f"{name!r} of the model is not in the file"
        if problem:
            break
    extra = [name for name in state if name not in own and not name.endswith(_OPTIONAL)]
    if not problem and extra:
        problem = f"{extra[0]!r} of the file is not in the model"
    if problem:
        raise ModelError(
            f"weights: {place} belongs to another model: {len(same)} of {len(needed)} "
            f"tensors match (the file holds {len(state)}); the first difference: {problem}; give "
            "the weights of this model, or the model of these weights"
        )
