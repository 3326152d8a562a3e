"""A module as an exported program (``file.pt2``), which runs without its code.

In: a module in fp32 and example inputs. Out: the file, in the precision that is wanted: a module
is lowered before it is exported, because a program has the types of its tensors written into it.
"""

from __future__ import annotations

import io
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from prune2deploy.atomic import replacing
from prune2deploy.errors import ExportError
from prune2deploy.exporting.export import first_line
from prune2deploy.modes import evaluating
from prune2deploy.surgery.copying import copied


def save(
    module: nn.Module, example_inputs: tuple[Tensor, ...], path: Path, precision: str = "fp32"
) -> None:
    """Write ``module`` with ``torch.export``; it is not changed.

    Args:
        module: In fp32.
        example_inputs: What it is called with.
        path: The file to write.
        precision: ``"fp16"`` for weights and inputs in half precision, else as they are.

    Raises:
        ExportError: torch cannot express the module, or not load what it wrote.
    """
    if precision == "fp16":
        module = copied(module, {}).half()
        example_inputs = tuple(x.half() if x.is_floating_point() else x for x in example_inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advice to the model's author, and to torch's own
        data = io.BytesIO()  # given a file, torch hides why it cannot be written
        torch.export.save(_exported(module, example_inputs), data)
        with replacing(path) as temporary:
            temporary.write_bytes(data.getbuffer())
            try:
                torch.export.load(temporary).module()
            except Exception as error:
                raise ExportError(
                    f"torch.export wrote a file that it cannot load ({first_line(error)})"
                ) from error


def _exported(
    module: nn.Module, example_inputs: tuple[Tensor, ...]
) -> torch.export.ExportedProgram:
    try:
        with evaluating(module):
            return torch.export.export(module, example_inputs, strict=False)
    except Exception as error:
        raise ExportError(
            f"torch.export cannot express this model ({first_line(error)})"
        ) from error
