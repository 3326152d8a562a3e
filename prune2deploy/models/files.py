"""Files that are no model by themselves: what they are, and what names the model instead.

In: a name that ends like such a file. Out: nothing but a ModelError.
"""

from __future__ import annotations

from pathlib import PurePath
from typing import NoReturn

from prune2deploy.errors import ModelError
from prune2deploy.models.loaded import Request

_WEIGHTS = (
    "a file of weights, which does not say what computes with them; expected the code that makes "
    "the model, and the file as its weights: --model file.py:factory --weights {name}"
)
_KINDS = {
    ".py": "a file of code; expected also the function in it that makes the model: "
    "--model {name}:FUNCTION",
    ".onnx": "an ONNX file, which holds no module that could be pruned; expected the PyTorch model "
    "that it was exported from (measure and build take ONNX files)",
    **dict.fromkeys((".pth", ".ckpt", ".bin", ".safetensors"), _WEIGHTS),
}
SUFFIXES = tuple(_KINDS)


def refuse(request: Request) -> NoReturn:
    """Say what the file is, and what to give instead.

    Raises:
        ModelError: Always.
    """
    kind = _KINDS[PurePath(request.name).suffix].format(name=request.name)
    raise ModelError(f"--model: found {request.name!r}, {kind}")
