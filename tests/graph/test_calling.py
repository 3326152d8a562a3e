"""A model is left as it was, whatever its attributes are made of."""

import torch
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.graph.calling import quiet


class Settings(dict):
    """Refuses to be changed, as some libraries' configurations do."""

    def _refuse(self, *_, **__):
        raise TypeError("settings are fixed")

    __setitem__ = __delitem__ = update = clear = pop = setdefault = _refuse


class Caching(nn.Module):
    """Keeps settings that cannot be changed, and a cache that its forward pass fills."""

    def __init__(self):
        super().__init__()
        self.settings = Settings(width=8)
        self.cache = {"old": 1}
        self.first, self.last = nn.Linear(4, self.settings["width"]), nn.Linear(8, 2)

    def forward(self, x):
        self.cache["new"] = x
        self.seen = x.shape
        return self.last(self.first(x))


def test_a_table_that_refuses_writes_is_no_obstacle():
    model = Caching()
    graph = trace(model, torch.randn(1, 4))
    assert [axis.size for axis in graph.prunable] == [8]


def test_what_the_forward_pass_keeps_is_forgotten():
    model = Caching().train()
    cache = model.cache
    with quiet(model):
        model(torch.randn(1, 4))
        assert not model.training and "new" in model.cache
    assert model.training and model.cache is cache and cache == {"old": 1}
    assert not hasattr(model, "seen")
