"""Weights from a file into a model, without running anything that the file holds.

In: a model and the path of a state dict (``torch.save`` or safetensors), plain or wrapped the ways
training scripts wrap it. Out: the model, filled. ``torch.load(weights_only=True)`` refuses a
pickle that would run code.
"""

from __future__ import annotations

import itertools
import json
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.errors import MissingBackend, ModelError

WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "net", "ema", "params")
PREFIXES = ("module.", "_orig_mod.", "model.")  # of DataParallel, torch.compile, Lightning
_CODE = ("GLOBAL", "REDUCE", "BUILD", "Unsupported class")  # what torch refuses to run
_OPTIONAL = "num_batches_tracked"  # counters that old checkpoints lack


def load_weights(module: nn.Module, path: Path) -> None:
    """Fill ``module`` with the state dict in ``path``, in place.

    Args:
        module: Gets every parameter and buffer; all must be in the file with equal shapes.
        path: A ``.safetensors`` file, or anything that ``torch.save`` wrote from tensors.

    Raises:
        ModelError: The file is missing, truncated, not a state dict, holds pickled code, or
            belongs to another model.
        MissingBackend: A ``.safetensors`` file without the safetensors library.
    """
    state = read_state_dict(path)
    own = module.state_dict()
    state = _without_prefix(state, own.keys())
    _check_fits(own, state, path)
    module.load_state_dict({**own, **{k: v for k, v in state.items() if k in own}})


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read names and tensors from a file; a wrapping such as ``{"state_dict": …}`` is opened.

    Raises:
        ModelError: See :func:`load_weights`.
    """
    if not path.is_file():
        raise ModelError(f"weights: no file {str(path)!r} found; expected a state dict")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    found = _unwrapped(_read_torch(path))
    if isinstance(found, Mapping):
        state = {k: v for k, v in found.items() if isinstance(v, Tensor)}
        if state and all(isinstance(key, str) for key in state):
            return state
    what = f"a {type(found).__name__}"
    if isinstance(found, Mapping):
        what += f" with keys {sorted(map(str, found))[:5]}"
    raise ModelError(
        f"weights: {str(path)!r} holds {what}; expected a state dict (names to tensors), as "
        "torch.save(model.state_dict(), FILE) writes it"
    )


def _read_torch(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # on unusual pickle protocols
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        detail = str(error).rpartition("WeightsUnpickler error:")[2].partition("Please file")[0]
        if not any(word in detail for word in _CODE):
            raise ModelError(_broken(path, detail)) from error
        raise ModelError(
            f"weights: {str(path)!r} holds pickled Python objects, which are refused because "
            "loading them can run code; save the tensors alone with "
            f"torch.save(model.state_dict(), FILE). torch says: {_short(detail)}"
        ) from error
    except Exception as error:  # damaged bytes make the unpickler raise anything
        raise ModelError(_broken(path, f"{type(error).__name__}: {error}")) from error


def _broken(path: Path, detail: str) -> str:
    return (
        f"weights: {str(path)!r} ({path.stat().st_size} bytes) cannot be read: it is truncated or "
        f"not written by torch.save; copy it again. {_short(detail)}"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else line[:300] + "…"


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


def _unwrapped(found: Any) -> Any:
    """Open ``{"state_dict": …}`` and the like, as often as they are nested."""
    while isinstance(found, Mapping):
        inner = [found[key] for key in WRAPPERS if isinstance(found.get(key), Mapping)]
        if not inner:
            return found
        found = inner[0]
    return found


def _without_prefix(state: dict[str, Tensor], names: Any) -> dict[str, Tensor]:
    """Strip the prefixes of nested wrappers with which most names match."""
    wanted = set(names)
    best = state
    for depth in range(1, len(PREFIXES) + 1):
        for prefix in map("".join, itertools.permutations(PREFIXES, depth)):
            candidate = {key.removeprefix(prefix): value for key, value in state.items()}
            if len(wanted & candidate.keys()) > len(wanted & best.keys()):
                best = candidate
    return best


def _check_fits(own: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Raise ModelError at the first name that is missing, unexpected or of another shape."""
    needed = [name for name in own if isinstance(own[name], Tensor)]
    same = [n for n in needed if n in state and state[n].shape == own[n].shape]
    problem = ""
    for name in needed:
        if name in state and state[name].shape != own[name].shape:
            problem = (
                f"{name!r} has shape {tuple(state[name].shape)} in the file and "
                f"{tuple(own[name].shape)} in the model"
            )
        elif name not in state and not name.endswith(_OPTIONAL):
            problem = f"{name!r} of the model is not in the file"
        if problem:
            break
    extra = [name for name in state if name not in own and not name.endswith(_OPTIONAL)]
    if not problem and extra:
        problem = f"{extra[0]!r} of the file is not in the model"
    if problem:
        raise ModelError(
            f"weights: {str(path)!r} belongs to another model: {len(same)} of {len(needed)} "
            f"tensors match (the file holds {len(state)}); the first difference: {problem}; give "
            "the weights of this model, or the model of these weights"
        )
