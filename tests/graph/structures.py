"""One small model for every structure that real models are made of."""

import torch
from torch import nn
from torch.nn import functional as F


class Through(nn.Module):
    """A convolution, something in the middle, a convolution; ``middle`` sees eight channels."""

    def __init__(self, middle, width=8, after=8, rank=2, **parts):
        super().__init__()
        convolution = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self.first = convolution(3, width, 1)
        self.last = convolution(after, 2, 1)
        for name, part in parts.items():
            setattr(self, name, part)
        self._middle = middle

    def forward(self, x):
        return self.last(self._middle(self, self.first(x)))


class Grouped(nn.Module):
    """Attention whose keys and values have fewer heads than its queries."""

    def __init__(self, heads=4, shared=2, width=8):
        super().__init__()
        self.heads, self.shared, self.width = heads, shared, width
        self.q = nn.Linear(12, heads * width)
        self.k = nn.Linear(12, shared * width)
        self.v = nn.Linear(12, shared * width)
        self.out = nn.Linear(heads * width, 12)

    def forward(self, x):
        b, n, _ = x.shape
        q = self.q(x).view(b, n, self.heads, self.width).transpose(1, 2)
        k = self.k(x).view(b, n, self.shared, self.width).transpose(1, 2)
        v = self.v(x).view(b, n, self.shared, self.width).transpose(1, 2)
        y = F.scaled_dot_product_attention(q, k, v, enable_gqa=self.shared != self.heads)
        return self.out(y.transpose(1, 2).reshape(b, n, self.heads * self.width))


class Fused(nn.Module):
    """Queries, keys and values from one layer, taken apart by ``unbind``."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1)).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, 24))


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.out = nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out(x + self.attend(x, x, x, need_weights=False)[0])


class Recurrent(nn.Module):
    def __init__(self, kind, **options):
        super().__init__()
        self.embed = nn.Linear(6, 10)
        self.rnn = kind(10, 8, batch_first=True, **options)
        width = options.get("proj_size") or 8
        self.out = nn.Linear(2 * width if options.get("bidirectional") else width, 3)

    def forward(self, x):
        return self.out(self.rnn(self.embed(x))[0])


class Words(nn.Module):
    def __init__(self, tied):
        super().__init__()
        self.table, self.mix = nn.Embedding(20, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 20, bias=False)
        if tied:
            self.head.weight = self.table.weight

    def forward(self, words):
        return self.head(self.mix(self.table(words)).relu())


class Bare(nn.Module):
    """Parameters that belong to no layer: a class token, positions, a scale."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Linear(6, 8), nn.Linear(8, 3)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.places = nn.Parameter(torch.randn(1, 6, 8))
        self.scale = nn.Parameter(torch.randn(8))

    def forward(self, x):
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), self.embed(x)], 1) + self.places
        return self.out(x * self.scale)


class Twice(nn.Module):
    """One layer called in two places."""

    def __init__(self):
        super().__init__()
        self.first, self.shared, self.out = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.shared(self.shared(self.first(x)).relu()))


class Einsum(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.out = nn.Linear(6, 8), nn.Linear(12, 3)
        self.mix = nn.Parameter(torch.randn(8, 12))

    def forward(self, x):
        return self.out(torch.einsum("bnc,cd->bnd", self.first(x), self.mix))


class OptionA(nn.Module):
    """A shortcut that pads channels with zeros, as the first residual networks had it."""

    def __init__(self):
        super().__init__()
        self.first, self.wide, self.out = nn.Conv2d(3, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.first(x)
        return self.out(self.wide(x) + F.pad(x, (0, 0, 0, 0, 2, 2)))


class SeveralInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.out = nn.Linear(4, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, pair, extra):
        return {"y": self.out(self.a(pair["a"]) + self.b(pair["b"])) + extra}


def shuffled(net, x):
    b, c, h, w = x.shape
    return x.view(b, 2, c // 2, h, w).transpose(1, 2).reshape(b, c, h, w)


def halves(net, x):
    a, b = x.chunk(2, 1)
    return torch.cat([b, a], 1)


def gated(net, x):
    a, b = x.chunk(2, 1)
    return a * b.sigmoid()


def both_halves(net, x):
    """Slices that overlap: six channels from either end."""
    return x[:, :6] + x[:, 2:]


def weighed(net, x):
    """Channels weighed by a convolution over their neighbours."""
    return x * net.over(x.mean((2, 3))[:, None]).sigmoid()[:, 0, :, None, None]


def rotated(net, x):
    """Heads whose two halves trade places, as rotary positions have it."""
    y = net.mix(x.flatten(2).transpose(1, 2)).view(2, 36, 2, 4)
    a, b = y[..., :2], y[..., 2:]
    y = y * net.angle.cos() + torch.cat([-b, a], -1) * net.angle.sin()
    return y.flatten(2).transpose(1, 2).unflatten(2, (6, 6))


def packed(net, x):
    """Sequences of different lengths through a recurrent layer."""
    steps = nn.utils.rnn.pack_padded_sequence(x.flatten(2).transpose(1, 2), [36, 20], True)
    y = nn.utils.rnn.pad_packed_sequence(net.rnn(steps)[0], batch_first=True)[0]
    return y.transpose(1, 2).unflatten(2, (6, 6))


def unpooled(net, x):
    """Maxima go back to where they were found."""
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(y, places, 2)


def unpooled_elsewhere(net, x):
    """Maxima of another tensor go where those of this one were found, as in a decoder."""
    y, places = F.max_pool2d(x, 2, return_indices=True)
    return F.max_unpool2d(net.mix(y), places, 2)


def grid(read):
    """Adds what is read of a grid of learnt vectors."""
    return lambda net, x: x + net.mix(read(net.grid).mean(2))[:, :, None, None]


def windows(net, x):
    columns = F.unfold(x, 3, padding=1)
    return F.fold(columns, x.shape[-2:], 3, padding=1)


def across(net, x):
    """The norm sees the channels last."""
    return net.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


IMAGE = torch.randn(2, 3, 6, 6)
TOKENS = torch.randn(2, 5, 6)


def _through(middle, **options):
    return lambda: Through(middle, **options)


STRUCTURES = {
    "convolution 1d": (_through(lambda n, x: x.relu(), rank=1), torch.randn(2, 3, 9), ["first"]),
    "convolution 3d": (
        _through(lambda n, x: x.relu(), rank=3),
        torch.randn(2, 3, 4, 4, 4),
        ["first"],
    ),
    "transposed": (
        _through(lambda n, x: n.up(x), up=nn.ConvTranspose2d(8, 8, 2, 2)),
        IMAGE,
        ["first", "up"],
    ),
    "transposed in groups": (
        _through(lambda n, x: n.up(x), up=nn.ConvTranspose2d(8, 8, 2, 2, groups=2)),
        IMAGE,
        ["first", "up"],
    ),
    "depthwise": (
        _through(lambda n, x: n.dw(x), dw=nn.Conv2d(8, 8, 3, groups=8)),
        IMAGE,
        ["first", "dw"],
    ),
    "depthwise, two channels of each": (
        _through(lambda n, x: n.dw(x), dw=nn.Conv2d(8, 16, 3, groups=8), after=16),
        IMAGE,
        ["first", "dw"],
    ),
    "depthwise 3d, transposed": (
        _through(lambda n, x: n.up(x), rank=3, up=nn.ConvTranspose3d(8, 8, 2, 2, groups=8)),
        torch.randn(2, 3, 4, 4, 4),
        ["first", "up"],
    ),
    "groups": (
        _through(lambda n, x: n.gr(x), gr=nn.Conv2d(8, 8, 3, groups=4)),
        IMAGE,
        ["first", "gr"],
    ),
    "one channel is no depthwise": (
        _through(lambda n, x: n.up(n.one(x)), one=nn.Conv2d(8, 1, 1), up=nn.Conv2d(1, 8, 1)),
        IMAGE,
        ["first", "up"],
    ),
    "group norm": (
        _through(lambda n, x: n.norm(x), norm=nn.GroupNorm(4, 8)),
        IMAGE,
        ["first", "norm"],
    ),
    "instance norm": (
        _through(lambda n, x: n.norm(x), norm=nn.InstanceNorm2d(8, affine=True)),
        IMAGE,
        ["first", "norm"],
    ),
    "layer norm over channels and space": (
        _through(lambda n, x: n.norm(x), norm=nn.LayerNorm([8, 6, 6])),
        IMAGE,
        ["first", "norm"],
    ),
    "layer norm": (_through(across, norm=nn.LayerNorm(8)), IMAGE, ["first", "norm"]),
    "rms norm": (_through(across, norm=nn.RMSNorm(8)), IMAGE, ["first", "norm"]),
    "prelu": (_through(lambda n, x: n.act(x), act=nn.PReLU(8)), IMAGE, ["first", "act"]),
    "chunk": (_through(halves), IMAGE, ["first"]),
    "gate": (_through(gated, after=4), IMAGE, ["first"]),
    "cat": (_through(lambda n, x: torch.cat([x, x.relu()], 1), after=16), IMAGE, ["first"]),
    "stack": (_through(lambda n, x: torch.stack([x, x.relu()], 1).sum(1)), IMAGE, ["first"]),
    "gated linear unit": (_through(lambda n, x: F.glu(x, 1), after=4), IMAGE, ["first"]),
    "parts of different size": (
        _through(lambda n, x: torch.cat(x.split([3, 5], 1)[::-1], 1)),
        IMAGE,
        ["first"],
    ),
    "parts of which the last is smaller": (
        _through(lambda n, x: torch.cat(x.chunk(3, 1)[::-1], 1)),
        IMAGE,
        ["first"],
    ),
    "a function mapped over samples": (
        _through(
            lambda n, x: torch.vmap(lambda one: n.norm(one[None])[0])(x), norm=nn.GroupNorm(4, 8)
        ),
        IMAGE,
        ["first", "norm"],
    ),
    "overlapping slices": (_through(both_halves, after=6), IMAGE, ["first"]),
    "unbound channels": (
        _through(lambda n, x: torch.stack(x.unbind(1)[:4], 1), after=4),
        IMAGE,
        [],
    ),
    "flipped channels": (_through(lambda n, x: x.flip(1)), IMAGE, []),
    "rolled channels": (_through(lambda n, x: x.roll(1, 1)), IMAGE, []),
    "weighed by neighbours": (
        _through(weighed, over=nn.Conv1d(1, 1, 3, padding=1)),
        IMAGE,
        [],
    ),
    "normed by neighbours": (
        _through(lambda n, x: n.norm(x), norm=nn.LocalResponseNorm(3)),
        IMAGE,
        [],
    ),
    "groups that do not divide": (
        _through(
            lambda n, x: n.three(n.two(x)),
            width=12,
            after=12,
            two=nn.Conv2d(12, 12, 1, groups=2),
            three=nn.Conv2d(12, 12, 1, groups=3),
        ),
        IMAGE,
        [],
    ),
    "groups to norm that do not divide": (
        _through(
            lambda n, x: n.norm(n.two(x)),
            width=12,
            after=12,
            two=nn.Conv2d(12, 12, 1, groups=2),
            norm=nn.GroupNorm(3, 12),
        ),
        IMAGE,
        [],
    ),
    "channel shuffle": (_through(shuffled), IMAGE, ["first"]),
    "channel shuffle module": (
        _through(lambda n, x: n.mix(x), mix=nn.ChannelShuffle(2)),
        IMAGE,
        ["first"],
    ),
    "pixel shuffle": (
        _through(lambda n, x: F.pixel_shuffle(x, 2), width=16, after=4),
        IMAGE,
        ["first"],
    ),
    "pixel unshuffle": (_through(lambda n, x: F.pixel_unshuffle(x, 2), after=32), IMAGE, ["first"]),
    "unfold and fold": (_through(windows), IMAGE, ["first"]),
    "gather in space": (
        _through(lambda n, x: x.gather(3, torch.zeros(2, 8, 6, 3, dtype=torch.long))),
        IMAGE,
        [],
    ),
    "index in space": (_through(lambda n, x: x[:, :, [0, 2, 4]]), IMAGE, ["first"]),
    "gather channels": (
        _through(lambda n, x: x.gather(1, torch.arange(8).view(1, 8, 1, 1).expand(2, 8, 6, 6))),
        IMAGE,
        [],
    ),
    "pooled and back": (_through(unpooled), IMAGE, ["first"]),
    "pooled and back in a decoder": (
        _through(unpooled_elsewhere, mix=nn.Conv2d(8, 8, 1)),
        IMAGE,
        ["first", "mix"],
    ),
    "windows of a learnt grid": (
        _through(
            grid(lambda g: F.unfold(g, 3)),
            grid=nn.Parameter(torch.rand(1, 4, 6, 6)),
            mix=nn.Linear(36, 8),
        ),
        IMAGE,
        ["first", "mix"],
    ),
    "pixels of a learnt grid traded for channels": (
        _through(
            grid(lambda g: F.pixel_unshuffle(g, 2).flatten(2)),
            mix=nn.Linear(16, 8),
            grid=nn.Parameter(torch.rand(1, 4, 6, 6)),
        ),
        IMAGE,
        ["first", "mix"],
    ),
    "masked by a value that is a tensor": (
        _through(lambda n, x: x.masked_fill(x > 1, torch.tensor(0.5))),
        IMAGE,
        ["first"],
    ),
    "matrix times vector": (
        _through(
            lambda n, x: x * torch.addmv(n.bias, n.matrix, n.vector)[:, None, None],
            bias=nn.Parameter(torch.rand(8)),
            matrix=nn.Parameter(torch.rand(8, 6)),
            vector=nn.Parameter(torch.rand(6)),
        ),
        IMAGE,
        ["first"],
    ),
    "index channels": (_through(lambda n, x: x[:, [1, 0, 3, 2, 5, 4, 7, 6]]), IMAGE, []),
    "repeat": (_through(lambda n, x: x.repeat(1, 2, 1, 1), after=16), IMAGE, ["first"]),
    "repeat interleave": (
        _through(lambda n, x: x.repeat_interleave(2, 1), after=16),
        IMAGE,
        ["first"],
    ),
    "expand": (
        _through(lambda n, x: x.unsqueeze(1).expand(-1, 2, -1, -1, -1).flatten(1, 2), after=16),
        IMAGE,
        ["first"],
    ),
    "weight norm": (
        _through(lambda n, x: n.w(x), w=nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 1))),
        IMAGE,
        ["first"],
    ),
    "padding along channels": (OptionA, IMAGE, ["wide"]),
    "linear over channels as positions": (
        _through(lambda n, x: n.mix(x.mean(-1)).unsqueeze(-1), mix=nn.Conv1d(8, 8, 1)),
        IMAGE,
        ["first", "mix"],
    ),
    "grouped-query attention": (Grouped, torch.randn(2, 5, 12), ["q", "k", "v"]),
    "one key head": (lambda: Grouped(shared=1), torch.randn(2, 5, 12), ["q", "k", "v"]),
    "fused qkv": (Fused, torch.randn(2, 5, 12), ["qkv"]),
    "nn.MultiheadAttention": (Multihead, TOKENS, ["embed", "attend.out_proj"]),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS, ["embed"]),
    "lstm both ways, two layers": (
        lambda: Recurrent(nn.LSTM, bidirectional=True, num_layers=2),
        TOKENS,
        ["embed"],
    ),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS, ["embed"]),
    "gru cell": (
        _through(lambda n, x: n.cell(x.mean((2, 3)))[:, :, None, None], cell=nn.GRUCell(8, 8)),
        IMAGE,
        ["first"],
    ),
    "lstm cell": (
        _through(lambda n, x: n.cell(x.mean((2, 3)))[0][:, :, None, None], cell=nn.LSTMCell(8, 8)),
        IMAGE,
        ["first"],
    ),
    "packed sequences": (_through(packed, rnn=nn.GRU(8, 8, batch_first=True)), IMAGE, ["first"]),
    "rotary positions": (
        _through(rotated, mix=nn.Linear(8, 8), angle=nn.Parameter(torch.rand(4))),
        IMAGE,
        ["first", "mix"],
    ),
    "distances": (
        _through(
            lambda n, x: (
                torch.cdist(x.flatten(2).transpose(1, 2), n.centres)
                .transpose(1, 2)
                .unflatten(2, (6, 6))
            ),
            centres=nn.Parameter(torch.randn(5, 8)),
            after=5,
        ),
        IMAGE,
        ["first"],
    ),
    "tied to its transpose": (
        _through(
            lambda n, x: F.conv_transpose2d(n.mix(x).relu(), n.mix.weight),
            mix=nn.Conv2d(8, 12, 3, bias=False),
        ),
        IMAGE,
        ["first", "mix"],
    ),
    "embedding": (lambda: Words(tied=False), torch.randint(0, 20, (2, 5)), ["mix"]),
    "tied embedding": (lambda: Words(tied=True), torch.randint(0, 20, (2, 5)), ["mix"]),
    "bare parameters": (Bare, TOKENS, ["embed"]),
    "called twice": (Twice, TOKENS, ["first", "shared"]),
    "einsum": (Einsum, TOKENS, ["first"]),
    "dict and list inputs": (
        SeveralInputs,
        ({"a": torch.randn(2, 4), "b": torch.randn(2, 5)}, torch.randn(2, 3)),
        ["a", "b"],
    ),
}
"""Name → builder, example inputs, the layers whose weights must become smaller."""
