"""What stays of its class: the widths that its code cannot follow are held, and no others."""

import pytest
import torch
from torch import fx, nn

import prune2deploy
from prune2deploy import cli
from prune2deploy.errors import ConfigError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.surgery.classes import HELD, keep_class
from prune2deploy.surgery.slicing import apply

from ..formula import formula_profile


class Mixing(nn.Module):
    """Attention over positions whose result takes the width of the input, as its code has it."""

    def __init__(self):
        super().__init__()
        self.heads, self.key, self.value = 2, 4, 8
        self.qkv = nn.Conv2d(16, self.heads * (2 * self.key + self.value), 1)
        self.out = nn.Conv2d(16, 16, 1)

    def forward(self, x):
        b, c, h, w = x.shape
        parts = self.qkv(x).view(b, self.heads, -1, h * w)
        q, k, v = parts.split([self.key, self.key, self.value], 2)
        mixed = v @ (q.transpose(-2, -1) @ k).softmax(-1).transpose(-2, -1)
        return self.out(mixed.view(b, c, h, w))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 24, 3), nn.ReLU(), nn.Conv2d(24, 16, 1))
        self.mixing = Mixing()
        self.head = nn.Sequential(nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 4, 1))

    def forward(self, x):
        return self.head(self.mixing(self.stem(x)))


class OneWidth(nn.Module):
    """Two layers whose widths the code takes from one attribute."""

    def __init__(self, width):
        super().__init__()
        self.width = width
        self.first, self.second = nn.Linear(5, width), nn.Linear(5, width)
        self.free = nn.Linear(2 * width, 9)
        self.last = nn.Linear(9, 2)

    def forward(self, x):
        both = [one(x).reshape(-1, self.width) for one in (self.first, self.second)]
        return self.last(self.free(torch.cat(both, 1)).relu())


def plan_of(counts, names):
    return Plan({name: tuple(range(counts[name])) for name in names})


def check(net, x, held):
    graph = trace(net, x)
    kept = keep_class(net, graph)
    assert {axis.name for axis in kept.axes if axis.frozen == HELD} == held
    free = {axis.name for axis in kept.prunable}
    assert free and free | held == {axis.name for axis in graph.prunable}
    for counts in probes(kept, 6, multiple=1, seed=5):
        assert type(apply(net, kept, plan_of(counts, free))) is type(net)
    for name in held:  # no one of them could have gone beside those that are free
        counts = {**{axis.name: axis.size - 1 for axis in graph.prunable}}
        assert isinstance(apply(net, graph, plan_of(counts, {name, *free})), fx.GraphModule), name
    return kept


def test_what_the_code_ties_is_held_and_all_else_is_free():
    torch.manual_seed(0)
    kept = check(
        Net().eval(),
        torch.randn(2, 3, 6, 6),
        {"stem.2", "mixing.qkv", "mixing.qkv:2"},
    )
    assert {"stem.0", "head.0"} <= {axis.name for axis in kept.prunable}


@pytest.mark.parametrize("width", [2, 3, 12])
def test_widths_that_one_attribute_stands_for_are_held(width):
    """Also where there is but one narrower width, so that narrower ones always agree."""
    torch.manual_seed(0)
    check(OneWidth(width).eval(), torch.randn(3, 5), {"first", "second"})


class Reading(nn.Module):
    """Its code reads an attribute of its blocks, which an identity does not have."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1)
        self.blocks = nn.ModuleList(Block(scale) for scale in (1, 1))
        self.plain = nn.Sequential(Block(1))
        self.last = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x) * block.scale
        return self.last(self.plain(x))


class Block(nn.Module):
    def __init__(self, scale):
        super().__init__()
        self.scale = scale
        self.inner = nn.Sequential(nn.Conv2d(8, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1))

    def forward(self, x):
        return x + self.inner(x)


def test_blocks_that_the_code_looks_into_stay():
    net, x = Reading().eval(), torch.randn(1, 3, 4, 4)
    graph = trace(net, x)
    assert {block.name for block in graph.blocks} == {"blocks.0", "blocks.1", "plain", "plain.0"}
    kept = keep_class(net, graph)
    assert {block.name for block in kept.blocks} == {"plain", "plain.0"}
    assert type(apply(net, kept, Plan({}, ("plain.0",)))) is Reading
    assert isinstance(apply(net, graph, Plan({}, ("blocks.0",))), fx.GraphModule)


def test_nothing_is_held_where_the_code_follows():
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)).eval()
    graph = trace(net, torch.randn(1, 3, 8, 8))
    assert keep_class(net, graph).axes == graph.axes


def test_prune_and_a_run_keep_the_class_where_asked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "device.toml").write_text(formula_profile(channel_multiple=2, step=2))
    torch.manual_seed(0)
    net, x = Net().eval(), torch.randn(1, 3, 6, 6)
    assert isinstance(prune2deploy.prune(net, x, 0.5), fx.GraphModule)
    half = prune2deploy.prune(net, x, 0.5, keep_class=True, keep=["head.0"])
    assert type(half) is Net and half.stem[0].out_channels == 12
    assert half.head[0].out_channels == 32
    result = prune2deploy.prune_to_budget(
        net, x, target="device.toml", speedup=1.2, keep_class=True
    )
    assert type(result.module) is Net
    assert not [note for note in result.report.notes if "captured" in note]
    captured = prune2deploy.prune_to_budget(
        net, x, target="device.toml", speedup=1.5, keep=["stem.2"]
    )
    assert isinstance(captured.module, fx.GraphModule)
    assert (
        "the pruned module is a captured graph, not a Net: the model's code holds some of its "
        "widths, which keep_class leaves alone"
    ) in captured.report.notes
    with pytest.raises(ConfigError, match="keep_class: found 'yes', expected True or False"):
        prune2deploy.prune(net, x, keep_class="yes")


def test_inspect_says_what_the_code_holds(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "tied_net.py").write_text(
        f"from {__name__} import Net\nimport torch\n"
        "def make():\n    return Net().eval(), (torch.randn(1, 3, 6, 6),)\n"
    )
    call = ["inspect", "--model", "tied_net:make"]
    assert cli.run([*call, "--keep-class"]) == 0
    assert capsys.readouterr().out.count(HELD) == 3
    assert cli.run(call) == 0
    assert HELD not in capsys.readouterr().out
