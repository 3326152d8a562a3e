"""Inputs that an exported file is to have, whether or not any of its operators reads them.

In: an ONNX file and the inputs of the module it came from. Out: the file, with those declared that
the exporter or a simplification left out because nothing depends on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import torch
from onnx import helper

BATCH = "batch"  # name of a free first dimension


def declare(file: Path, inputs: Mapping[str, torch.Tensor], *, free_batch: bool = False) -> None:
    """Add the missing ones of ``inputs``, by name, to those of ``file``, in this order."""
    model = onnx.load(str(file), load_external_data=False)
    found = {given.name: given for given in model.graph.input}
    if inputs.keys() <= found.keys():
        return
    for name in inputs.keys() - found.keys():
        tensor = inputs[name]
        kind = helper.np_dtype_to_tensor_dtype(torch.empty(0, dtype=tensor.dtype).numpy().dtype)
        dims: list[int | str] = list(tensor.shape)
        if free_batch and dims:
            dims[0] = BATCH
        found[name] = helper.make_tensor_value_info(name, kind, dims)
    others = [given for name, given in found.items() if name not in inputs]
    del model.graph.input[:]
    model.graph.input.extend([*(found[name] for name in inputs), *others])
    onnx.save_model(model, str(file))
