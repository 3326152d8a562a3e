"""Blocks: which can be taken out, and what is left when they are."""

import copy

import pytest
import torch
from torch import nn

from prune2deploy.errors import PlanError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply


class Block(nn.Module):
    def __init__(self, width, inner):
        super().__init__()
        self.a, self.b = nn.Conv2d(width, inner, 3, padding=1), nn.Conv2d(inner, width, 1)
        self.norm, self.drop = nn.BatchNorm2d(width), nn.Dropout(0.1)

    def forward(self, x):
        return self.drop((x + self.norm(self.b(self.a(x).relu()))).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.plain = nn.Conv2d(8, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.one, self.two = Block(8, 6), Block(8, 4)
        self.head = nn.Linear(8, 2)

    def forward(self, x):
        x = self.depthwise(self.plain(self.stem(x)))
        return self.head(self.two(self.one(x)).mean((2, 3)))


def skipping(model, name):
    model = copy.deepcopy(model)
    model.set_submodule(name, nn.Identity())
    return model


def test_only_blocks_with_an_identity_shortcut_are_listed():
    graph = trace(Net(), torch.randn(1, 3, 8, 8))
    assert [b.name for b in graph.blocks] == ["one", "two"]


@pytest.mark.parametrize("captured", [False, True])
def test_a_removed_block_hands_its_input_on(captured):
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    plan = Plan({"two.a": (0, 2)}, removed=("one",))
    pruned = apply(model, graph, plan)
    if captured:
        pruned = capture(copy.deepcopy(pruned), model, graph, plan)
    expected = apply(model, graph, Plan({"two.a": (0, 2)}))
    torch.testing.assert_close(pruned(x), skipping(expected, "one")(x))
    assert not [name for name in pruned.state_dict() if name.startswith("one.")]


def test_counts_leave_removed_blocks_out():
    model, x = Net().eval(), torch.randn(2, 3, 8, 8)
    graph = trace(model, x)
    pruned = apply(model, graph, Plan({}, removed=("two",)))
    rest = graph.without(("two",))
    assert rest.params() == sum(p.numel() for p in pruned.parameters()) < graph.params()
    assert rest.macs() == trace(pruned, x).macs() < graph.macs()
    assert "two.a" not in [axis.name for axis in rest.axes]


def test_what_is_not_a_block_cannot_be_removed():
    graph = trace(Net(), torch.randn(1, 3, 8, 8))
    with pytest.raises(PlanError, match=r"'plain' is not a removable block.*one.*two"):
        apply(Net(), graph, Plan({}, removed=("plain",)))


def test_a_plan_survives_json():
    plan = Plan({"two.a": (0, 2)}, removed=("one",))
    assert Plan.from_json(plan.to_json()) == plan
    with pytest.raises(PlanError, match="schema"):
        Plan.from_json('{"schema": 99, "kept": {}}')
    with pytest.raises(PlanError, match="not a plan"):
        Plan.from_json("[]")


class Masked(nn.Module):
    """Blocks that take a mask besides what they change, as transformers do."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(4, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(MaskedBlock() for _ in range(2))

    def forward(self, x):
        mask = x.sum(-1, keepdim=True) > 0
        x = self.stem(x)
        for block in self.blocks:
            x = block(x, mask=mask)
        return self.head(x)


class MaskedBlock(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x, mask):
        return x + self.inner(x) * mask


def test_blocks_are_found_whatever_the_batch():
    for batch in (1, 3):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        model = nn.Sequential(nn.Linear(4, 8), layer, nn.Linear(8, 2)).eval()
        layer.norm_first = True
        assert [b.name for b in trace(model, torch.randn(batch, 5, 4)).blocks] == ["1"]


class Windowed(nn.Module):
    """Adds in one view of its input and in another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        n, h, w, c = x.shape
        x = (x + self.a(x)).reshape(n, h * w, c)
        return (x + self.b(x)).view(n, h, w, c)


def test_blocks_that_add_in_another_view_are_found_and_those_that_turn_are_not():
    class Turned(Windowed):
        def forward(self, x):
            return super().forward(x).transpose(1, 2)

    x = torch.randn(1, 3, 3, 4)
    for block, found in ((Windowed(), ["1"]), (Turned(), [])):
        model = nn.Sequential(nn.Linear(4, 8), block, nn.Linear(8, 2)).eval()
        graph = trace(model, x)
        assert [b.name for b in graph.blocks] == found
        for name in found:
            pruned = apply(model, graph, Plan({}, removed=(name,)))
            torch.testing.assert_close(pruned(x), model[2](model[0](x)))


@pytest.mark.parametrize("captured", [False, True])
def test_blocks_with_more_than_one_argument_are_removable_too(captured):
    model, x = Masked().eval(), torch.randn(3, 4)
    graph = trace(model, x)
    assert [b.name for b in graph.blocks] == ["blocks.0", "blocks.1"]
    plan = Plan({}, removed=("blocks.0",))
    pruned = apply(model, graph, plan)
    if captured:
        pruned = capture(copy.deepcopy(pruned), model, graph, plan)
    mask = x.sum(-1, keepdim=True) > 0
    torch.testing.assert_close(pruned(x), model.head(model.blocks[1](model.stem(x), mask)))


class Windows(nn.Module):
    """Mixes within windows of two by two, then flattens the positions and restores them."""

    def __init__(self):
        super().__init__()
        self.mix, self.widen = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        b, h, w, c = x.shape
        parts = x.view(b, h // 2, 2, w // 2, 2, c).permute(0, 1, 3, 2, 4, 5)
        mixed = self.mix(parts).permute(0, 1, 3, 2, 4, 5).reshape(b, h, w, c)
        x = (x + mixed).reshape(b, -1, c)
        return (x + self.widen(x)).reshape(b, h, w, c)


class Swinging(nn.Module):
    """Two such blocks."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 4)
        self.blocks = nn.Sequential(Windows(), Windows())

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((1, 2)))


def test_blocks_that_split_positions_into_windows_are_found():
    torch.manual_seed(0)
    model, x = Swinging().eval(), torch.randn(2, 6, 6, 3)
    graph = trace(model, x)
    assert {"blocks.0", "blocks.1"} <= {block.name for block in graph.blocks}
    pruned = apply(model, graph, Plan({}, removed=("blocks.0",)))
    with torch.no_grad():
        expected = model.head(model.blocks[1](model.stem(x)).mean((1, 2)))
        torch.testing.assert_close(pruned(x), expected)


class Finished(nn.Module):
    """A layer and how it is joined to its input."""

    def __init__(self, join):
        super().__init__()
        self.layer, self._join = nn.Linear(8, 8), join

    def forward(self, x):
        return self._join(x, self.layer(x))


JOINED = {
    "added": (lambda x, y: x + y, True),
    "rectified": (lambda x, y: (x + y).relu(), True),
    "bounded": (lambda x, y: nn.functional.relu6(y + x), True),
    "clamped": (lambda x, y: (x + y).clamp(0, 20), True),
    "dropped": (lambda x, y: nn.functional.dropout(x + y, 0.5, training=False), True),
    "a part of the layer": (lambda x, y: torch.add(x, y, alpha=-1), True),
    "taken away": (lambda x, y: torch.add(y, x, alpha=-1), False),
    "halved": (lambda x, y: (x + y) * 0.5, False),
    "turned round": (lambda x, y: -(x + y), False),
    "squashed": (lambda x, y: (x + y).sigmoid(), False),
    "raised": (lambda x, y: (x + y).exp(), False),
}


@pytest.mark.parametrize("name", JOINED)
def test_blocks_hand_their_input_on_as_it_is(name):
    """A layer that gives zero changes nothing, and nor does taking it out."""
    torch.manual_seed(0)
    join, removable = JOINED[name]
    block = Finished(join)
    nn.init.zeros_(block.layer.weight)
    nn.init.zeros_(block.layer.bias)
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), block, nn.Linear(8, 3)), torch.ones(2, 6)
    graph = trace(model.eval(), x)
    assert [found.name for found in graph.blocks] == ["2"] * removable
    if removable:
        torch.testing.assert_close(apply(model, graph, Plan({}, ("2",)))(x), model(x))
