"""What a run works on, by content: one run may go on from another only where all of it agrees.

In: a module, its example inputs, calibration data. Out: plain values. Names do not do: a file of
weights, a model's source or a folder of pictures may change between two commands that are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from types import CodeType
from typing import Any

import torch
from torch import Tensor, nn


def content(module: nn.Module, example_inputs: Iterable[Tensor], batches: Any) -> dict[str, str]:
    """Describe what a run works on.

    Args:
        module: The model; its state and the code of its classes count.
        example_inputs: Their types and shapes count.
        batches: Calibration data or ``None``. Data of our recipes counts by its content; of other
            data, which may be shuffled or augmented, only type and number of batches.

    Returns:
        ``weights``, ``code``, ``inputs`` and ``data`` as text.
    """
    return {
        "weights": weights_digest(module),
        "code": code_digest(module),
        "inputs": ", ".join(map(_described, example_inputs)),
        "data": "" if batches is None else _data(batches),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's state, in order."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(f"{name}{tuple(value.shape)}{value.dtype}".encode())
        if not value.is_meta:
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def code_digest(model: nn.Module) -> str:
    """SHA-256 over the compiled methods of a model's own classes; comments do not count."""
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    own = {kind.__qualname__: kind for kind in kinds - {*nn.Module.__mro__}}
    text = "".join(f"{name}{_methods(own[name])}" for name in sorted(own))
    return hashlib.sha256(text.encode()).hexdigest()


def _methods(kind: type) -> str:
    found = {name: getattr(value, "__code__", None) for name, value in vars(kind).items()}
    return "".join(name + _compiled(code) for name, code in sorted(found.items()) if code)


def _compiled(value: Any) -> str:
    """What a code object does, wherever its source stands; other constants as they are written."""
    if isinstance(value, CodeType):
        constants = "".join(map(_compiled, value.co_consts))
        return f"{value.co_code.hex()}{value.co_names}{constants}"
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _data(batches: Any) -> str:
    known = getattr(batches, "sha256", "")
    count = len(batches) if hasattr(batches, "__len__") else "?"
    return str(known) or f"{type(batches).__name__} of {count} batches"
