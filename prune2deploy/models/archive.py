"""Archives of ``torch.export`` (``file.pt2``): a graph, its weights and its example inputs.

In: the path. Out: the exported program as a module. The archive holds no code; parts of it that
are pickled are read with ``weights_only`` forced, so a forged one cannot run any.
"""

from __future__ import annotations

import contextlib
import os
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune2deploy.errors import ModelError
from prune2deploy.models.loaded import LoadedModel, Request
from prune2deploy.modes import let_switch

_FORCE = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def load(request: Request) -> LoadedModel:
    """Open a ``torch.export`` archive.

    Its shapes are fixed when it is made, so its own example inputs are used.

    Raises:
        ModelError: No such file, not such an archive, without example inputs, or another batch is
            asked for than the archive was made with.
    """
    path = Path(request.name)
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r} found; expected an archive of torch.export.save")
    if not zipfile.is_zipfile(path):
        raise ModelError(
            f"{str(path)!r} ({path.stat().st_size} bytes) is not an archive that torch.export.save "
            "wrote, or cannot be read: it is no zip file; copy it again or export the model again"
        )
    try:
        with _weights_only():
            program = torch.export.load(path)
        module = program.module()
    except Exception as error:
        raise ModelError(
            f"{str(path)!r} is not an archive that torch.export.save wrote, or holds pickled "
            f"code, which is not run: {type(error).__name__}: {error}"
        ) from error
    let_switch(module)
    inputs = _inputs(program.example_inputs, path)
    _check_batch(inputs, request)
    return LoadedModel(
        module=module,
        example_inputs=inputs,
        spec=request.name,
        library="torch.export",
        input_names=tuple(program.graph_signature.user_inputs),
    )


@contextlib.contextmanager
def _weights_only() -> Iterator[None]:
    """Have every ``torch.load`` below refuse pickled code, whatever its caller asks for."""
    before = os.environ.get(_FORCE)
    os.environ[_FORCE] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_FORCE]
        else:
            os.environ[_FORCE] = before


def _inputs(example: Any, path: Path) -> tuple[Tensor, ...]:
    positional, named = example or ((), {})
    if positional and not named and all(isinstance(one, Tensor) for one in positional):
        return tuple(positional)
    raise ModelError(
        f"{str(path)!r} holds no positional example inputs that are tensors only; export it "
        "again with torch.export.export(model, (tensor, ...))"
    )


def _check_batch(inputs: tuple[Tensor, ...], request: Request) -> None:
    shape = tuple(inputs[0].shape)
    if request.batch != 1 and shape[:1] != (request.batch,):
        raise ModelError(
            f"{request.name!r} was exported with inputs of shape {shape}; batch {request.batch} "
            f"is asked for; leave --batch out or export it again"
        )
