"""Every structure is traced, pruned by half, runs, and loses what the formulas say."""

import copy

import pytest
import torch
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.graph.calling import run, tensors_in
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

from .structures import STRUCTURES, Recurrent, Through, Words


def halves(graph):
    return Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable})


def built(name):
    torch.manual_seed(0)
    builder, example, shrunk = STRUCTURES[name]
    return builder().eval(), example, shrunk


@pytest.mark.parametrize("name", STRUCTURES)
def test_half_of_every_axis_goes_and_the_model_runs(name):
    model, example, shrunk = built(name)
    graph = trace(model, example)
    plan = halves(graph)
    pruned = apply(model, graph, plan)
    before, after = (list(tensors_in(run(m, example))) for m in (model, pruned))
    assert [t.shape for t in after] == [t.shape for t in before]
    stored = {
        **dict(pruned.named_parameters(remove_duplicate=False)),
        **dict(pruned.named_buffers()),
    }
    assert {n: tuple(t.shape) for n, t in stored.items()} == graph.shapes(plan.counts)
    for layer in shrunk:
        old, new = model.get_parameter(f"{layer}.weight"), pruned.get_parameter(f"{layer}.weight")
        assert new.numel() < old.numel(), layer
    sum(t.sum() for t in tensors_in(run(pruned.train(), example))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in pruned.parameters())


@pytest.mark.parametrize("name", STRUCTURES)
def test_the_captured_form_of_the_untouched_model_computes_the_same(name):
    model, example, _ = built(name)
    captured = capture(copy.deepcopy(model), model, trace(model, example), Plan({})).eval()
    for a, b in zip(
        tensors_in(run(model, example)), tensors_in(run(captured, example)), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    assert captured.state_dict().keys() == model.state_dict().keys()


def test_heads_and_head_width_are_axes_of_their_own():
    model, example, _ = built("grouped-query attention")
    graph = trace(model, example)
    sizes = sorted(a.size for a in graph.prunable)
    assert sizes == [2, 2, 8, 8]  # key heads, queries per key head, key width, value width
    plan = Plan({a.name: tuple(range(a.size // 2)) for a in graph.prunable if a.size == 8})
    pruned = apply(model, graph, plan)
    assert pruned.get_parameter("q.weight").shape == (4 * 4, 12)
    assert pruned.get_parameter("k.weight").shape == (2 * 4, 12)


def test_whole_groups_may_go_or_equally_many_channels_of_each():
    model, example, _ = built("groups")
    graph = trace(model, example)
    groups, inner = graph["first"], graph["first:1"]
    whole = apply(model, graph, Plan({groups.name: (0, 2)}))
    assert (whole.gr.groups, whole.gr.weight.shape[:2]) == (2, (4, 2))
    each = apply(model, graph, Plan({inner.name: (1,)}))
    assert (each.gr.groups, each.gr.weight.shape[:2]) == (4, (8, 1))


def test_a_tied_embedding_stays_tied():
    model, example, _ = built("tied embedding")
    graph = trace(model, example)
    pruned = apply(model, graph, halves(graph))
    assert pruned.table.weight is pruned.head.weight
    assert pruned.table.weight.shape == (20, 4)


def test_a_dimension_picked_by_number_is_frozen_and_says_so():
    model, example, _ = built("index channels")
    assert trace(model, example)["first"].frozen == "positions are picked by number"


def test_positions_that_a_kernel_reads_across_are_frozen():
    def middle(net, x):  # channels as positions of a one-dimensional convolution of width three
        return net.mix(x.flatten(2).transpose(1, 2)).transpose(1, 2).unflatten(2, (6, 6))

    model = Through(middle, mix=nn.Conv1d(36, 36, 3, padding=1)).eval()
    graph = trace(model, torch.randn(1, 3, 6, 6))
    assert graph["first"].frozen == "read through a kernel"


def test_every_direction_and_layer_of_a_recurrent_network_has_the_same_units():
    model = Recurrent(nn.LSTM, bidirectional=True, num_layers=2).eval()
    x = torch.randn(1, 5, 6)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert (pruned.rnn.input_size, pruned.rnn.hidden_size) == (5, 4)
    assert pruned.rnn.weight_ih_l1_reverse.shape == (16, 8)


@pytest.mark.filterwarnings("ignore:LSTM with projections")  # oneDNN has none
def test_what_a_recurrent_network_projects_to_is_an_axis():
    model, x = Recurrent(nn.LSTM, proj_size=4).eval(), torch.randn(2, 5, 6)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert type(pruned) is Recurrent
    assert (pruned.rnn.input_size, pruned.rnn.hidden_size, pruned.rnn.proj_size) == (5, 4, 2)
    assert pruned.out.in_features == 2


@pytest.mark.parametrize(
    ("name", "layer", "reason"),
    [
        ("weighed by neighbours", "first", "read through a kernel"),
        ("normed by neighbours", "first", "read through a kernel"),
        ("groups that do not divide", "two", "groups cut across its channels"),
        ("groups to norm that do not divide", "two", "groups cut across its channels"),
    ],
)
def test_channels_that_stay_say_what_holds_them(name, layer, reason):
    model, example, _ = built(name)
    assert trace(model, example)[layer].frozen == reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("unbound channels", "picked by number"),
        ("gather channels", "picked by number"),
        ("flipped channels", "order matters"),
        ("rolled channels", "order matters"),
    ],
)
def test_channels_whose_places_matter_stay_and_say_why(name, reason):
    model, example, _ = built(name)
    graph = trace(model, example)
    assert reason in graph["first"].frozen
    assert not graph.prunable and not graph.unknown


def test_what_the_forward_pass_does_not_use_is_kept_and_says_so():
    model = Words(tied=False)
    model.spare = nn.Linear(4, 4)
    graph = trace(model, torch.randint(0, 20, (1, 5)))
    assert graph["spare"].frozen == "not used in the forward pass"
    pruned = apply(model, graph, halves(graph))
    assert pruned.spare.weight.shape == (4, 4)


def test_a_captured_model_keeps_what_it_does_not_use_and_its_kind_of_result():
    model, example, _ = built("fused qkv")
    model.spare = nn.Linear(4, 4)
    graph = trace(model, example)
    pruned = apply(model, graph, halves(graph))
    assert isinstance(pruned, torch.fx.GraphModule)
    assert "spare.weight" in pruned.state_dict()


def test_a_table_of_numbers_is_not_an_axis_to_prune():
    class Places(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.out = nn.Embedding(16, 8), nn.Linear(8, 3)
            self.register_buffer("numbers", torch.arange(16))

        def forward(self, x):
            return self.out(x + self.table(self.numbers[: x.shape[1]]))

    graph = trace(Places(), torch.randn(1, 5, 8))
    assert all(m.tensor != "numbers" for axis in graph.prunable for m in axis.members)


def test_sizes_that_values_decide_do_not_stop_pruning():
    class Found(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.score, self.out = nn.Linear(4, 8), nn.Linear(8, 1), nn.Linear(8, 3)

        def forward(self, x):
            x = self.first(x)
            return self.out(x[self.score(x)[:, 0] > 0])

    torch.manual_seed(0)
    model, x = Found(), torch.randn(40, 4)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert type(pruned) is Found
    assert pruned.first.weight.shape == (4, 4)
    assert pruned(x).shape[1] == 3


def test_a_meta_model_is_traced_and_pruned_without_memory():
    with torch.device("meta"):
        model, x = STRUCTURES["grouped-query attention"][0](), torch.randn(2, 5, 12)
    graph = trace(model, x)
    pruned = apply(model, graph, halves(graph))
    assert {p.device.type for p in pruned.parameters()} == {"meta"}
    assert graph.params(halves(graph).counts) == sum(p.numel() for p in pruned.parameters())


def test_hooks_that_a_forward_pass_installs_are_gone_again():
    class Lazy(nn.Module):
        """Installs a hook in its first pass and remembers that it did."""

        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 3)
            self.ready, self.calls = False, []

        def forward(self, x):
            if not self.ready:
                self.first.register_forward_hook(lambda *_: self.calls.append(1))
                self.ready = True
            return self.out(self.first(x))

    model, x = Lazy(), torch.randn(1, 4)
    trace(model, x)
    assert not model.ready
    assert not model.first._forward_hooks
    model.calls.clear()
    model(x)
    assert len(model.calls) == 1


class Masked(nn.Module):
    """Attention over windows, with a mask that is written region by region in the forward pass."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(12, 72), nn.Linear(24, 12)

    def forward(self, x):
        b, n, _ = x.shape
        mask = x.new_zeros((n, n))
        for place in range(n):
            mask[place, place:] = -100.0
        q, k, v = self.qkv(x).reshape(b, n, 3, 4, 6).permute(2, 0, 3, 1, 4).unbind(0)
        y = (q @ k.transpose(-2, -1) + mask).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(b, n, 24))


def test_tables_that_code_builds_in_place_are_constants_of_the_captured_model():
    torch.manual_seed(0)
    model, x = Masked().eval(), torch.randn(1, 5, 12)
    captured = capture(copy.deepcopy(model), model, trace(model, x), Plan({})).eval()
    torch.testing.assert_close(captured(x), model(x))
    calls = [str(n.target) for n in captured.graph.nodes if n.op == "call_function"]
    assert not [call for call in calls if "fill" in call or "zeros" in call]
    assert captured.state_dict().keys() == model.state_dict().keys()


def test_memory_that_is_written_at_run_time_is_not_a_constant():
    class Scattered(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.out = nn.Linear(4, 8), nn.Linear(8, 3)

        def forward(self, x):
            kept = torch.zeros(2, 8)
            kept[:, :] = self.first(x)
            return self.out(kept)

    model, x = Scattered().eval(), torch.randn(2, 4)
    captured = capture(copy.deepcopy(model), model, trace(model, x), Plan({})).eval()
    for other in (x, torch.randn(2, 4), torch.randn(2, 4)):
        torch.testing.assert_close(captured(other), model(other))
