"""What is said to carry a factor into one value does so, and carries it nowhere else."""

import copy
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.errors import TraceError
from prune2deploy.graph import trace
from prune2deploy.surgery.carrying import Carriers
from prune2deploy.surgery.spellings import ATTENTIONS

WIDTH = 8
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0)).double()


class Woven(nn.Module):
    """Queries, keys and values from random operators, whose weights are now and then shared."""

    def __init__(self, seed):
        super().__init__()
        self.seed, self.scale = seed, None
        self.made = nn.ParameterDict()

    def stored(self, name, *shape):
        if name not in self.made:
            self.made[name] = nn.Parameter(torch.randn(shape, dtype=torch.float64) / 2)
        return self.made[name]

    def one(self, dice, a, b, name):
        half, square = WIDTH // 2, (WIDTH, WIDTH)
        return dice.choice(
            [
                lambda: F.linear(a, self.stored(f"{name}w", *square), self.stored(name, WIDTH)),
                lambda: F.linear(a, self.stored(f"{name}w", *square)),
                lambda: F.linear(a, self.stored(f"{name}f", 2 * WIDTH, WIDTH)).chunk(2, -1)[0],
                lambda: F.layer_norm(a, (WIDTH,), self.stored(name, WIDTH)),
                lambda: a + b,
                lambda: a * b,
                lambda: a * self.stored(name, WIDTH),
                lambda: a + self.stored(f"{name}p", 5, WIDTH),
                lambda: torch.cat([-a[..., half:], a[..., :half]], -1),
                lambda: torch.stack(a.chunk(2, -1)[::-1], 2).flatten(2),
                lambda: a.unflatten(2, (2, half)).transpose(2, 3).flatten(2),
                lambda: a.roll(1, 1) * 0.5 - a,
                lambda: a.relu(),
                lambda: a.clone().add_(1.0),
            ]
        )()  # fmt: skip

    def forward(self, x):
        dice, pool = random.Random(self.seed), [x.clone()]
        for step in range(dice.randint(4, 10)):
            a, b = (dice.choice(pool[-4:]) for _ in range(2))
            pool.append(self.one(dice, a, b, f"at{dice.choice([step, step, step, 0])}"))
            if dice.random() < 0.1:
                pool[-1][..., :2].mul_(2)
        q, k, v = (dice.choice(pool[-5:])[:, None] for _ in range(3))
        others = [value.sum() for value in pool if dice.random() < 0.05]
        return (F.scaled_dot_product_attention(q, k, v, scale=self.scale), *others)


@torch.no_grad()
@pytest.mark.parametrize("first", range(0, 240, 80))
def test_entries_multiply_what_they_are_said_to_and_nothing_else(first):
    found = 0
    for seed in range(first, first + 80):
        torch.manual_seed(seed)
        model = Woven(seed).eval()
        model(X)  # makes its weights
        try:
            recording = trace(model, X).recording
        except TraceError:  # it has none
            continue
        (call,) = (one for one in recording.operations if one.name in ATTENTIONS)
        for side in ("query", "key"):
            entries = Carriers(recording).entries([(call, side)])
            if entries is None:
                continue
            again = copy.deepcopy(model)
            again.scale = WIDTH**-0.5 / 1.5
            for name, chosen in entries.items():
                again.get_parameter(name).mul_(1.0 + 0.5 * chosen.double())
            for one, other in zip(model(X), again(X), strict=True):
                torch.testing.assert_close(one, other)
            found += 1
    assert found >= 10
