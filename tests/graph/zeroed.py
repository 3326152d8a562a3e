"""The oracle of pruning: channels that are zero may go, and nothing changes."""

import copy

import numpy as np
import torch


def zeroed(model, graph, plan, where=lambda member: True):
    """The model with zeros where its tensors hold a channel that the plan removes.

    ``where`` chooses among the members of each axis.
    """
    model = copy.deepcopy(model)
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        for name, channels in plan.kept.items():
            for member in filter(where, graph[name].members):
                gone = (member.channel >= 0) & ~np.isin(member.channel, channels)
                places = torch.from_numpy(np.flatnonzero(gone))
                tensors[member.tensor].index_fill_(member.dim, places, 0)
    return model
