"""From the members of an axis to one number per channel: the arithmetic that criteria share.

In: a model and its graph. Out: per axis, the stored tensors that count for it, and reductions of
element-wise quantities to channels. A member's positions are summed over the other dimensions of
its tensor and added up per channel (``Member.channel``; positions of no channel are left out).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from prune2deploy.errors import ConfigError
from prune2deploy.graph.axes import Axis, Graph, Member
from prune2deploy.graph.calling import stored_tensors
from prune2deploy.graph.trace import unwrap

Scores = dict[str, Tensor]
"""Axis name → float32 tensor of shape (size,) on the CPU; higher means keep."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A model with its graph, as the criteria see it.

    Attributes:
        model: The module that ``graph`` was traced from.
        graph: Its graph.
    """

    model: nn.Module
    graph: Graph

    @cached_property
    def stored(self) -> Mapping[str, Tensor]:
        """Every parameter and buffer by name, tied ones under each of their names."""
        return dict(stored_tensors(unwrap(self.model)))

    @cached_property
    def owners(self) -> Mapping[str, nn.Module]:
        """Module by path."""
        return dict(unwrap(self.model).named_modules(remove_duplicate=False))

    def tensor(self, member: Member) -> Tensor:
        """The stored tensor of a member, checked against the graph.

        Raises:
            ConfigError: the model is not the one that the graph was traced from.
        """
        tensor = self.stored.get(member.tensor)
        if tensor is None or tensor.shape[member.dim : member.dim + 1] != member.channel.shape:
            found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
            raise ConfigError(
                f"{member.tensor} is {found}; expected {len(member.channel)} positions in "
                f"dimension {member.dim}. Score the model that the graph was traced from, or "
                "trace it again"
            )
        return tensor.detach()

    def counted(self, axis: Axis) -> list[tuple[Member, Tensor]]:
        """Members whose size says how much a channel matters: weights and scales.

        Biases, statistics and integer tensors do not count unless an axis has nothing else.
        A tensor that is stored under several names counts once.
        """
        everything = list(self._distinct(axis))
        weights = [
            (member, tensor)
            for member, tensor in everything
            if member.tensor in self.graph.parameters and not _is_bias(member, tensor)
        ]
        return weights or everything

    def scales(self, axis: Axis) -> list[tuple[Member, Tensor]]:
        """Members that multiply a channel by one number each, as normalisation layers do."""
        return [
            (member, tensor)
            for member, tensor in self._distinct(axis)
            if tensor.dim() == 1 and _leaf(member) == "weight" and not self._slope(member)
        ]

    def _slope(self, member: Member) -> bool:
        return isinstance(self.owners.get(member.tensor.rpartition(".")[0]), nn.PReLU)

    def _distinct(self, axis: Axis) -> Iterator[tuple[Member, Tensor]]:
        seen = set()
        for member in axis.members:
            tensor = self.tensor(member)
            if not tensor.is_floating_point():
                continue
            place = (tensor.data_ptr(), tuple(tensor.shape), member.dim, member.channel.tobytes())
            if tensor.device.type == "meta" or place not in seen:
                seen.add(place)
                yield member, tensor


def _is_bias(member: Member, tensor: Tensor) -> bool:
    """By its name; one of several in a module has a longer one (``in_proj_bias``)."""
    words = _leaf(member).split("_")
    return words == ["bias"] or (tensor.dim() == 1 and "bias" in words)


def _leaf(member: Member) -> str:
    return member.tensor.rpartition(".")[2]


def to_channels(values: Tensor, member: Member, size: int) -> Tensor:
    """Add up element-wise ``values`` per channel of the member's axis.

    Args:
        values: Same shape as the member's tensor.
        member: Which dimension, and which channel each of its positions belongs to.
        size: Channels of the axis.

    Returns:
        Shape (size,), float32, on the CPU.
    """
    positions = values.float().movedim(member.dim, 0).reshape(len(member.channel), -1).sum(1).cpu()
    channel = torch.from_numpy(member.channel)
    inside = channel >= 0
    return torch.zeros(size, dtype=torch.float32).index_add_(0, channel[inside], positions[inside])


def as_vectors(tensor: Tensor, member: Member, size: int) -> Tensor:
    """The elements of each channel side by side: shape (size, elements per channel)."""
    channel = torch.from_numpy(member.channel)
    order = torch.argsort(channel, stable=True)[int((channel < 0).sum()) :]
    rows = tensor.float().movedim(member.dim, 0).reshape(len(member.channel), -1).cpu()
    return rows[order].reshape(size, -1)


def mean_one(scores: Tensor) -> Tensor:
    """Scale to a mean of one; all ones where every score is zero. NaN stays, to be refused."""
    mean = scores.mean()
    return torch.ones_like(scores) if mean <= 0 else scores / mean


def scaled_together(scores: Scores) -> Scores:
    """Scale all axes by one common factor, so that the mean over all their channels is one."""
    sizes = [len(values) for values in scores.values()]
    parts = mean_one(torch.cat(list(scores.values()))).split(sizes) if sizes else ()
    return dict(zip(scores, parts, strict=True))
