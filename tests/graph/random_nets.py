"""Random small networks whose removed channels only meet per-channel operators."""

from __future__ import annotations

import random

import torch
from torch import nn


class ConvBlock(nn.Module):
    def __init__(self, width, out, rng, groups=1):
        super().__init__()
        self.conv = nn.Conv2d(width, out, rng.choice([1, 3]), padding="same", groups=groups)
        self.norm = nn.BatchNorm2d(out)
        self.act = rng.choice([nn.ReLU(), nn.SiLU(), nn.PReLU(out), nn.Identity()])

    def forward(self, x):
        return self.act(self.norm(self.conv(x)))


class Residual(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        middle = rng.choice([4, 6, 8])
        self.first = ConvBlock(width, middle, rng)
        self.second = ConvBlock(middle, width, rng)

    def forward(self, x):
        return x + self.second(self.first(x))


class Depthwise(nn.Module):
    def __init__(self, width, multiplier):
        super().__init__()
        self.conv = nn.Conv2d(width, width * multiplier, 3, padding=1, groups=width)

    def forward(self, x):
        return self.conv(x).relu()


class Grouped(nn.Module):
    """An expansion, a convolution in groups, a projection."""

    def __init__(self, width, out, rng):
        super().__init__()
        groups = rng.choice([2, 4])
        self.expand = ConvBlock(width, groups * 3, rng)
        self.conv = nn.Conv2d(groups * 3, groups * 2, 3, padding=1, groups=groups)
        self.project = nn.Conv2d(groups * 2, out, 1)

    def forward(self, x):
        return self.project(self.conv(self.expand(x)).relu())


class Dense(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        self.a = ConvBlock(width, 4, rng)
        self.b = ConvBlock(width + 4, 6, rng)

    def forward(self, x):
        a = self.a(x)
        return torch.cat([x, a, self.b(torch.cat([x, a], 1))], 1)


class Split(nn.Module):
    """One half goes through a block, both are joined again."""

    def __init__(self, width, out, rng):
        super().__init__()
        self.widen = ConvBlock(width, 8, rng)
        self.inner = Residual(4, rng)
        self.join = ConvBlock(12, out, rng)

    def forward(self, x):
        a, b = self.widen(x).chunk(2, 1)
        return self.join(torch.cat([a, b, self.inner(b)], 1))


class Shuffle(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        self.conv = ConvBlock(width, 8, rng)

    def forward(self, x):
        x = self.conv(x)
        b, c, h, w = x.shape
        return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


class Squeeze(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        self.down, self.up = nn.Conv2d(width, 4, 1), nn.Conv2d(4, width, 1)

    def forward(self, x):
        return x * self.up(self.down(x.mean((2, 3), keepdim=True)).relu()).sigmoid()


class Head(nn.Module):
    def __init__(self, width, rng):
        super().__init__()
        self.flat = rng.random() < 0.5
        self.norm = nn.BatchNorm1d(width * 36 if self.flat else width)
        self.fc1 = nn.Linear(width * 36 if self.flat else width, 10)
        self.fc2 = nn.Linear(10, 3)

    def forward(self, x):
        x = x.flatten(1) if self.flat else x.mean((2, 3))
        return self.fc2(self.fc1(self.norm(x)).relu())


def network(seed: int, depth: int) -> nn.Sequential:
    """A random network for inputs of shape (2, 3, 6, 6), with BatchNorm statistics filled in."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    width = 8
    layers: list[nn.Module] = [ConvBlock(3, width, rng)]
    for _ in range(depth):
        out = rng.choice([4, 8, 12])
        kind = rng.choice(["conv", "res", "depth", "group", "dense", "split", "shuffle", "se"])
        if kind == "conv":
            layers.append(ConvBlock(width, out, rng))
            width = out
        elif kind == "res":
            layers.append(Residual(width, rng))
        elif kind == "depth":
            layers.append(Depthwise(width, rng.choice([1, 2])))
            width = layers[-1].conv.out_channels
        elif kind == "group":
            layers.append(Grouped(width, out, rng))
            width = out
        elif kind == "dense":
            layers.append(Dense(width, rng))
            width += 10
        elif kind == "split":
            layers.append(Split(width, out, rng))
            width = out
        elif kind == "shuffle":
            layers.append(Shuffle(width, rng))
            width = 8
        else:
            layers.append(Squeeze(width, rng))
    model = nn.Sequential(*layers, Head(width, rng))
    with torch.no_grad():
        model.train()
        for _ in range(3):
            model(torch.randn(8, 3, 6, 6) + 0.3)
    return model.double().eval()
