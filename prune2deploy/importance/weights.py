"""Criteria that look at the weights alone; no data is needed.

Each takes a ``Subject`` and gives the scores of every prunable axis. All members of an axis are
scored together (Fang et al., "DepGraph", CVPR 2023), because all of them lose the channel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prune2deploy.graph.axes import Axis
from prune2deploy.importance.members import Scores, Subject, as_vectors, mean_one, to_channels

ROWS = 1024  # rows of a distance matrix that are held at a time


def l1(subject: Subject) -> Scores:
    """Sum of absolute weights (Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017).

    Normalisation: every member to a mean of one over its channels, then their mean, so that
    each layer of a group has the same say whatever its fan-in.
    """
    return {axis.name: _magnitude(subject, axis, 1) for axis in subject.graph.prunable}


def l2(subject: Subject) -> Scores:
    """Euclidean norm of the weights (He et al., "Soft Filter Pruning", IJCAI 2018).

    Normalisation: every member to a mean of one over its channels, then their mean.
    """
    return {axis.name: _magnitude(subject, axis, 2) for axis in subject.graph.prunable}


def _magnitude(subject: Subject, axis: Axis, power: int) -> Tensor:
    norms = [
        mean_one(to_channels(tensor.float().abs() ** power, member, axis.size) ** (1 / power))
        for member, tensor in subject.counted(axis)
    ]
    return (
        mean_one(torch.stack(norms).mean(0))
        if norms
        else torch.ones(axis.size, dtype=torch.float32)
    )


def group_norm(subject: Subject) -> Scores:
    """Euclidean norm of all weights that go with a channel, across its layers.

    The quantity that group-lasso training shrinks (Yuan & Lin 2006; Fang et al., CVPR 2023).
    Normalisation: mean of one over the channels of an axis. Layers with larger fan-in count more.
    """
    return {axis.name: mean_one(_group_norm(subject, axis)) for axis in subject.graph.prunable}


def _group_norm(subject: Subject, axis: Axis) -> Tensor:
    energy = torch.zeros(axis.size, dtype=torch.float32)
    for member, tensor in subject.counted(axis):
        energy += to_channels(tensor.float() ** 2, member, axis.size)
    return energy.sqrt()


def bn_scale(subject: Subject) -> Scores:
    """Absolute scale of the normalisation layers (Liu et al., "Network Slimming", ICCV 2017).

    Frozen normalisation layers that hold their scale as a buffer count too. An axis that no
    normalisation layer scales is scored by ``l2``. Normalisation: as ``l2``.
    """
    scores = {}
    for axis in subject.graph.prunable:
        scales = [
            mean_one(to_channels(tensor.abs(), member, axis.size))
            for member, tensor in subject.scales(axis)
        ]
        mean = torch.stack(scales).mean(0) if scales else _magnitude(subject, axis, 2)
        scores[axis.name] = mean_one(mean)
    return scores


def fpgm(subject: Subject) -> Scores:
    """Distance to all other channels of the axis (He et al., "FPGM", CVPR 2019).

    A channel near the geometric median of the others can be replaced by them. The vector of a
    channel is made of its weights in all members. Normalisation: mean of one per axis.
    """
    return {axis.name: mean_one(_distances(subject, axis)) for axis in subject.graph.prunable}


def _distances(subject: Subject, axis: Axis) -> Tensor:
    parts = [as_vectors(tensor, member, axis.size) for member, tensor in subject.counted(axis)]
    if not parts:
        return torch.ones(axis.size, dtype=torch.float32)
    vectors = torch.cat(parts, 1)
    chunks = [torch.cdist(rows, vectors).sum(1) for rows in vectors.split(ROWS)]
    return torch.cat(chunks)


def lamp(subject: Subject) -> Scores:
    """Energy over the energy of all channels at least as large (Lee et al., "LAMP", ICLR 2021).

    Normalisation: the score is relative by construction, in (0, 1], and the largest channel of
    every axis has score one: a common threshold never empties an axis.
    """
    scores = {}
    for axis in subject.graph.prunable:
        energy = _group_norm(subject, axis) ** 2
        ranked, order = energy.sort()
        from_here_up = ranked.flip(0).cumsum(0).flip(0).clamp_min(torch.finfo(ranked.dtype).tiny)
        scores[axis.name] = torch.empty_like(ranked).index_copy_(0, order, ranked / from_here_up)
    return scores


def random(subject: Subject, seed: int) -> Scores:
    """Uniform random numbers in (0, 1]: the baseline that a criterion has to beat.

    Normalisation: none. The same ``seed`` gives the same numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        axis.name: 1.0 - torch.rand(axis.size, generator=generator)
        for axis in subject.graph.prunable
    }
