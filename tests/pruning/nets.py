"""Small networks for the tests of the pruning interface."""

import torch
from torch import nn
from torch.nn import functional as F


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x):
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Res(nn.Module):
    """A stem, two residual blocks, a widening convolution, a classifier."""

    def __init__(self, width=16, classes=10):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer1 = nn.Sequential(Block(width), Block(width))
        self.layer2 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU())
        self.fc = nn.Linear(2 * width, classes)

    def forward(self, x):
        x = self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class Plain(nn.Module):
    """Two convolutions with nothing but a per-channel layer between."""

    def __init__(self, between, width=8):
        super().__init__()
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.between = between
        self.last = nn.Conv2d(width, 4, 1)

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Attention(nn.Module):
    """Fused qkv; the code spells out that the heads' width is the embedding's."""

    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(b, n, c))


class Transformer(nn.Module):
    def __init__(self, dim=16, heads=4):
        super().__init__()
        self.embed = nn.Linear(6, dim)
        self.token = nn.Parameter(torch.randn(1, 1, dim))
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.head = nn.Linear(dim, 5)

    def forward(self, x):
        x = self.embed(x)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
        x = x + self.attention(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.head(x[:, 0])


class Tied(nn.Module):
    """The embedding is the classifier too."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 16)
        self.back = nn.Linear(16, 8)
        self.out = nn.Linear(8, 11, bias=False)
        self.out.weight = self.table.weight

    def forward(self, x):
        x = self.table(x)
        return self.out(x + self.back(F.relu(self.mix(x))))


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def zeroed(weight, dim, idxs):
    """A copy of a weight with some positions of a dimension set to zero."""
    copy = weight.detach().clone()
    copy.index_fill_(dim, torch.tensor(idxs), 0)
    return copy
