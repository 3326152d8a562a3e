"""Plan → a new, smaller module; the module that was traced is not touched.

In: a module, its graph, a plan. Out: a pruned copy whose forward pass was checked, operator by
operator, against the widths that the plan implies. First the stored tensors of a deep copy are
sliced and the width attributes of standard ``torch.nn`` modules follow, and where it takes that
to run as planned, those of the model's own modules (``attributes``). Where its Python code holds
widths as constants, so that no copy runs as planned, the recorded operators are handed back as a
captured module instead (``capture``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.graph.axes import Graph
from prune2deploy.graph.calling import stored_tensors
from prune2deploy.graph.recording import Recording
from prune2deploy.graph.trace import unwrap
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.attributes import runs_with_its_code, update_attributes
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.checking import check_outputs
from prune2deploy.surgery.compensation import Factors, compensation
from prune2deploy.surgery.copying import copied
from prune2deploy.surgery.lengths import Kept
from prune2deploy.surgery.scales import spelt
from prune2deploy.surgery.widths import Widths


@torch.inference_mode(False)  # what is made of the caller's tensors is to train
def apply(model: nn.Module, graph: Graph, plan: Plan, example_inputs: Any = None) -> nn.Module:
    """Prune a copy of ``model`` as ``plan`` says.

    Args:
        model: The module that ``graph`` was traced from.
        graph: Its graph.
        plan: Kept channels per axis.
        example_inputs: Inputs to check the result with; those of the trace by default.

    Returns:
        A pruned module of the same class, or a captured ``torch.fx.GraphModule`` with the same
        parameter names where the model's code holds widths as constants.

    Raises:
        PlanError: the plan does not fit the graph.
        PruneError: the result does not run.
    """
    pruned, follows = _with_its_code(model, graph, plan, example_inputs)
    return pruned if follows else _captured(pruned, unwrap(model), graph, plan, example_inputs)


@torch.inference_mode(False)
def keeps_class(model: nn.Module, graph: Graph, plan: Plan, example_inputs: Any = None) -> bool:
    """Whether ``apply`` gives back a module of the same class; raises PlanError as it does."""
    return _with_its_code(model, graph, plan, example_inputs)[1]


def _with_its_code(
    model: nn.Module, graph: Graph, plan: Plan, example_inputs: Any
) -> tuple[nn.Module, bool]:
    """A pruned copy of the same class, and whether it runs as planned."""
    plan.check(graph)
    source = unwrap(model)
    recording: Recording = graph.recording
    example = recording.example if example_inputs is None else example_inputs
    kept = kept_positions(graph, plan)
    factors = compensation(graph, dict(stored_tensors(source)), kept, plan)
    pruned = sliced_copy(source, kept, factors)
    widths = Widths(graph, plan)
    update_attributes(pruned, recording, widths)
    for call in recording.spans(plan.removed).values():
        pruned.set_submodule(call.name, nn.Identity() if call.plain else Skipped())
    follows = not spelt(recording, widths, plan.removed) and runs_with_its_code(
        pruned, recording, widths, example, plan.removed
    )
    return pruned, follows


class Skipped(nn.Module):
    """In place of a removed block that takes more than one argument: hands on the first."""

    def forward(self, x: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """The first argument."""
        return x


def _captured(
    pruned: nn.Module, source: nn.Module, graph: Graph, plan: Plan, example_inputs: Any
) -> nn.Module:
    """The captured form; with the batch of the example fixed where it cannot be left free."""
    recording: Recording = graph.recording
    example = recording.example if example_inputs is None else example_inputs
    widths = Widths(graph, plan)
    module = capture(pruned, source, graph, plan)
    try:
        check_outputs(module, recording, widths, example)
    except PruneError:
        module = capture(pruned, source, graph, plan, free_batch=False)
        check_outputs(module, recording, widths, example)
    return module


def kept_positions(graph: Graph, plan: Plan) -> dict[str, list[npt.NDArray[np.int64] | None]]:
    """For every stored tensor, the kept positions of each dimension (None: all of them)."""
    gone: dict[tuple[str, int], npt.NDArray[np.bool_]] = {}
    for name, channels in plan.kept.items():
        axis = graph[name]
        removed = np.ones(axis.size + 1, dtype=bool)
        removed[[*channels, -1]] = False  # position -1 belongs to no channel and stays
        for member in axis.members:
            place = (member.tensor, member.dim)
            mask = removed[member.channel]
            gone[place] = gone[place] | mask if place in gone else mask
    return {
        name: [
            np.flatnonzero(~gone[name, dim]) if (name, dim) in gone else None
            for dim in range(len(dims))
        ]
        for name, dims in graph.tensors.items()
    }


def sliced_copy(module: nn.Module, kept: Kept, factors: Factors) -> nn.Module:
    """A deep copy whose stored tensors are multiplied and sliced; what goes is never copied."""
    done: dict[int, Any] = {}
    for name, tensor in stored_tensors(module):
        dims = kept[name]
        changes = name in factors or any(positions is not None for positions in dims)
        if id(tensor) not in done and changes:
            done[id(tensor)] = sliced(tensor, dims, factors.get(name), with_gradient=False)
    return copied(module, done)


def slice_tensors(module: nn.Module, kept: Kept, factors: Factors) -> None:
    """Multiply and slice parameters and buffers in place; tensors that are shared stay shared."""
    done: dict[int, torch.Tensor] = {}
    owners = dict(module.named_modules(remove_duplicate=False))
    for name, dims in kept.items():
        if name not in factors and all(positions is None for positions in dims):
            continue
        path, _, leaf = name.rpartition(".")
        owner = owners[path]
        table: Any = owner._parameters if leaf in owner._parameters else owner._buffers
        old = table[leaf]
        if id(old) not in done:
            done[id(old)] = sliced(old, dims, factors.get(name))
            done[id(done[id(old)])] = done[id(old)]
        table[leaf] = done[id(old)]


def sliced(
    tensor: torch.Tensor,
    dims: list[npt.NDArray[np.int64] | None],
    factor: torch.Tensor | None = None,
    *,
    with_gradient: bool = True,
) -> torch.Tensor:
    """Keep the given positions of each dimension; a parameter stays one, its gradient follows.

    With a ``factor``, which broadcasts to its shape, the tensor is multiplied by that before.
    """
    whole = tensor.detach()
    result = picked(whole if factor is None else whole * factor.to(whole), dims)
    if not isinstance(tensor, nn.Parameter):
        return result
    parameter = nn.Parameter(result, requires_grad=tensor.requires_grad)
    if with_gradient and tensor.grad is not None:
        parameter.grad = picked(tensor.grad, dims)
    return parameter


def picked(tensor: torch.Tensor, dims: Sequence[npt.NDArray[np.int64] | None]) -> torch.Tensor:
    """The given positions of each dimension; one of size one stands for all positions."""
    for dim, positions in enumerate(dims):
        if positions is not None and tensor.shape[dim] > 1:
            index = torch.as_tensor(positions, device=tensor.device)
            tensor = tensor.index_select(dim, index)
    return tensor.contiguous()
