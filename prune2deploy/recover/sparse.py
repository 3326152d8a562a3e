"""Sparse training: penalties that push whole channels towards zero before they are removed.

In: a graph and the module it was traced from. Out: scalars to be added to a loss. A channel of an
axis is everything that would go with it, in all tensors that the axis cuts, so what is pushed down
together is exactly what is removed together. Only prunable axes are penalised.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prune2deploy.graph.axes import Axis, Graph, Member

_TINY = 1e-12  # keeps the square root differentiable at zero


def channel_squares(module: nn.Module, axis: Axis) -> Tensor:
    """Return the sum of squares of each channel's parameters, (axis.size,), differentiable."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    members = [member for member in axis.members if member.tensor in parameters]
    device = next(module.parameters()).device
    sums = torch.zeros(axis.size, dtype=torch.float32, device=device)
    for member in members:
        weight = parameters[member.tensor]
        others = [dim for dim in range(weight.ndim) if dim != member.dim]
        squares = weight.float().square()
        squares = squares.sum(others) if others else squares
        chosen, channel = _index(member, device)
        sums = sums.index_add(0, channel, squares[chosen])
    return sums


def channel_sizes(module: nn.Module, axis: Axis) -> Tensor:
    """Return how many parameter values each channel of ``axis`` holds, (axis.size,)."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    sizes = torch.zeros(axis.size, dtype=torch.float32)
    for member in axis.members:
        if member.tensor in parameters:
            weight = parameters[member.tensor]
            chosen, channel = _index(member, torch.device("cpu"))
            each = weight.numel() / weight.shape[member.dim]
            sizes = sizes.index_add(
                0, channel, torch.full((len(chosen),), each, dtype=torch.float32)
            )
    return sizes


def group_lasso(module: nn.Module, graph: Graph) -> Tensor:
    """Sum over channels of sqrt(values in the channel) times their Euclidean norm; a scalar.

    Source: Yuan and Lin, J. R. Stat. Soc. B 68 (2006), 49-67; over coupled layers: Fang et al.,
    DepGraph, arXiv 2301.12900.
    """
    total = next(module.parameters()).new_zeros(())
    for axis in graph.prunable:
        norms = (channel_squares(module, axis) + _TINY).sqrt()
        total = total + (channel_sizes(module, axis).to(norms).sqrt() * norms).sum()
    return total


def bn_scale(module: nn.Module, graph: Graph) -> Tensor:
    """Sum of the absolute BatchNorm scales of all prunable channels; a scalar.

    Source: Liu et al., Network Slimming, arXiv 1708.06519.
    """
    scales = {
        f"{name}.weight" if name else "weight": part.weight
        for name, part in module.named_modules()
        if isinstance(part, _BatchNorm) and part.affine
    }
    total = next(module.parameters()).new_zeros(())
    for axis in graph.prunable:
        for member in axis.members:
            if member.tensor in scales:
                chosen, _ = _index(member, total.device)
                total = total + scales[member.tensor][chosen].abs().sum()
    return total


@dataclass(frozen=True, eq=False)
class Growing:
    """A penalty on channels to be removed that grows while it is trained with.

    Call it with a module for the scalar; every few steps go on with ``grown(...)``.
    Source: Wang et al., Neural Pruning via Growing Regularization, arXiv 2012.09243.

    Attributes:
        graph: The module's.
        strengths: Axis name to one strength per channel, (axis.size,).
        ceiling: No strength grows beyond this.
    """

    graph: Graph
    strengths: Mapping[str, Tensor]
    ceiling: float = 1.0

    @staticmethod
    def start(graph: Graph, ceiling: float = 1.0) -> Growing:
        """Return a penalty that is zero everywhere."""
        zero = {axis.name: torch.zeros(axis.size, dtype=torch.float32) for axis in graph.prunable}
        return Growing(graph, zero, ceiling)

    def grown(self, kept: Mapping[str, tuple[int, ...]], step: float) -> Growing:
        """Return the penalty with every channel that is not ``kept`` strengthened by ``step``.

        Args:
            kept: Axis name to the channels that stay, as in a plan; others are left alone.
            step: Added to the strength.
        """
        new = dict(self.strengths)
        for name, channels in kept.items():
            rise = torch.full_like(new[name], step)
            rise[list(channels)] = 0.0
            new[name] = (new[name] + rise).clamp(max=self.ceiling)
        return Growing(self.graph, new, self.ceiling)

    def __call__(self, module: nn.Module) -> Tensor:
        """Return half the sum over channels of strength times sum of squares; a scalar."""
        total = next(module.parameters()).new_zeros(())
        for name, strength in self.strengths.items():
            if bool(strength.any()):
                squares = channel_squares(module, self.graph[name])
                total = total + 0.5 * (strength.to(squares) * squares).sum()
        return total


def _index(member: Member, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return positions of a member's dimension that belong to its axis, and their channels."""
    channel = torch.as_tensor(member.channel, device=device)
    chosen = (channel >= 0).nonzero().flatten()
    return chosen, channel[chosen]
