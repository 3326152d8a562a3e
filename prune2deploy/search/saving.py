"""The pruned module as files that PyTorch loads: with its code, and without.

In: a run directory and a module. Out: a state dict, and a program of ``torch.export``.
"""

from __future__ import annotations

import io

import torch
from torch import Tensor, nn

from prune2deploy.errors import ExportError
from prune2deploy.exporting import program
from prune2deploy.rundir import RunDir


def save_weights(run: RunDir, module: nn.Module, name: str) -> None:
    """Save the state dict of a module; given a file, torch hides why it cannot be written."""
    data = io.BytesIO()
    torch.save(module.state_dict(), data)
    with run.place(name) as path:
        path.write_bytes(data.getbuffer())


def save_module(run: RunDir, module: nn.Module, example_inputs: tuple[Tensor, ...]) -> str:
    """Save the pruned module loadable with its code (``weights.pt``) and without (``.pt2``).

    Returns:
        Why ``model.pt2`` could not be written, or an empty text.
    """
    save_weights(run, module, "weights.pt")
    try:
        with run.place("model.pt2") as path:
            program.save(module, example_inputs, path)
    except ExportError as error:
        return (
            f"model.pt2 is missing because {error}; "
            "load it with its own code from weights.pt and plan.json"
        )
    return ""
