"""Scores: hand counts, what a criterion must rank first, and what must not change."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.errors import ConfigError, ModelError
from prune2deploy.graph import trace
from prune2deploy.graph.axes import Member
from prune2deploy.importance import CRITERIA, NAMES, score
from prune2deploy.importance.members import Subject, as_vectors, to_channels

FREE = [name for name, criterion in CRITERIA.items() if not criterion.needs_data]
DATA = [name for name, criterion in CRITERIA.items() if criterion.needs_data]


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.next = nn.Conv2d(8, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = self.next(torch.relu(self.bn(self.conv(x))))
        return self.head(x.mean((2, 3)))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(12, 3 * 2 * 4)
        self.out = nn.Linear(8, 12)

    def forward(self, x):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, 2, 4).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.out(y.transpose(1, 2).reshape(b, n, -1)) + x


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [(((torch.randn(4, 3, 8, 8)),), torch.tensor([0, 1, 2, 3])) for _ in range(3)]


def kill(net, channel):
    """Make a channel of the first convolution useless in every criterion's eyes."""
    with torch.no_grad():
        net.conv.weight[channel] = 0
        net.conv.bias[channel] = 0
        net.bn.weight[channel] = 0
        net.bn.bias[channel] = 0
        net.next.weight[:, channel] = 0


@pytest.mark.parametrize("name", [n for n in NAMES if n not in ("random", "fpgm")])
def test_a_dead_channel_scores_lowest(net, batches, name):
    kill(net, 5)
    graph = trace(net, batches[0][0])
    scores = score(name, net, graph, batches)
    assert int(scores["conv"].argmin()) == 5
    assert float(scores["conv"][5]) == 0


def test_fpgm_ranks_the_channel_in_the_middle_lowest(net, batches):
    with torch.no_grad():
        for tensor, dim in ((net.conv.weight, 0), (net.bn.weight, 0), (net.next.weight, 1)):
            others = [i for i in range(8) if i != 2]
            middle = tensor.index_select(dim, torch.tensor(others)).mean(dim)
            tensor.select(dim, 2).copy_(middle)
    graph = trace(net, batches[0][0])
    assert int(score("fpgm", net, graph)["conv"].argmin()) == 2


@pytest.mark.parametrize("name", NAMES)
def test_every_prunable_axis_gets_finite_scores_that_are_not_negative(batches, name):
    model = Heads().eval()
    data = [((torch.randn(2, 5, 12),), None)] * 2
    graph = trace(model, data[0][0])
    assert len(graph.prunable) >= 2  # heads, and the width of a head
    scores = score(name, model, graph, data)
    assert list(scores) == [axis.name for axis in graph.prunable]
    for axis in graph.prunable:
        found = scores[axis.name]
        assert found.shape == (axis.size,) and found.dtype == torch.float32
        assert torch.isfinite(found).all() and (found >= 0).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "random"])
def test_weights_that_are_not_finite_are_named(net, batches, name):
    graph = trace(net, batches[0][0])
    with torch.no_grad():
        net.next.weight[0, 1] = float("nan")
    with pytest.raises(ModelError, match=r"next\.weight hold NaN or infinite numbers"):
        score(name, net, graph, batches)


@pytest.mark.parametrize("name", DATA)
def test_data_that_is_not_finite_is_told(net, batches, name):
    graph = trace(net, batches[0][0])
    (picture,), labels = batches[0]
    with pytest.raises(ModelError, match="the weights are finite, but not what"):
        score(name, net, graph, [((picture * float("inf"),), labels)])


def test_l2_of_a_group_by_hand(net, batches):
    graph = trace(net, batches[0][0])
    rows = net.conv.weight.detach().flatten(1).norm(dim=1)
    scale = net.bn.weight.detach().abs()
    columns = net.next.weight.detach().transpose(0, 1).flatten(1).norm(dim=1)
    expected = torch.stack([v / v.mean() for v in (rows, scale, columns)]).mean(0)
    torch.testing.assert_close(score("l2", net, graph)["conv"], expected / expected.mean())
    energy = (rows**2 + scale**2 + columns**2).sqrt()
    torch.testing.assert_close(score("group_norm", net, graph)["conv"], energy / energy.mean())


def test_taylor_by_hand(net, batches):
    graph = trace(net, batches[0][0])
    total = torch.zeros(8)
    for inputs, labels in batches:
        net.zero_grad()
        nn.functional.cross_entropy(net(*inputs), labels).backward()
        parts = (
            (net.conv.weight * net.conv.weight.grad).sum((1, 2, 3)),
            net.bn.weight * net.bn.weight.grad,
            (net.next.weight * net.next.weight.grad).sum((0, 2, 3)),
        )
        total += torch.stack([p.detach().abs() for p in parts]).mean(0)
    net.zero_grad()
    found = score("taylor", net, graph, batches)["conv"]
    torch.testing.assert_close(found / found.sum(), total / total.sum())


def test_hessian_and_fisher_look_at_samples_one_by_one(net, batches):
    graph = trace(net, batches[0][0])
    whole = [(tuple(torch.cat(c) for c in zip(*(b[0] for b in batches), strict=True)),
              torch.cat([b[1] for b in batches]))]  # fmt: skip
    for name in ("hessian", "fisher"):
        apart, together = score(name, net, graph, batches), score(name, net, graph, whole)
        for axis in apart:
            torch.testing.assert_close(apart[axis], together[axis], rtol=1e-4, atol=1e-5)


def test_lamp_gives_each_axis_one_channel_of_score_one(net, batches):
    graph = trace(net, batches[0][0])
    for values in score("lamp", net, graph).values():
        assert float(values.max()) == 1.0
        assert int((values == 1.0).sum()) == 1


def test_random_depends_on_its_seed_alone(net, batches):
    graph = trace(net, batches[0][0])
    first, again, other = (score("random", net, graph, seed=s)["conv"] for s in (3, 3, 4))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.parametrize("name", DATA)
def test_the_model_is_left_as_it_was_and_frozen_parameters_are_scored(net, batches, name):
    net.train()
    net.conv.weight.requires_grad_(False)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    graph = trace(net, batches[0][0])
    with torch.no_grad():
        found = score(name, net, graph, batches)["conv"]
    assert float(found.std()) > 0
    assert net.training and net.bn.training
    assert not net.conv.weight.requires_grad and net.next.weight.requires_grad
    assert all(p.grad is None for p in net.parameters())
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


def test_tied_weights_count_once():
    torch.manual_seed(0)

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 6)
            self.mid = nn.Linear(6, 6)
            self.out = nn.Linear(6, 10, bias=False)
            self.out.weight = self.table.weight

        def forward(self, x):
            return self.out(self.mid(self.table(x)))

    model = Tied()
    graph = trace(model, torch.arange(4)[None])
    axis = next(a for a in graph.prunable if any(m.tensor == "table.weight" for m in a.members))
    columns = model.table.weight.detach().norm(dim=0)
    energy = columns**2
    for member in axis.members:
        if member.tensor == "mid.weight":
            energy = energy + (model.mid.weight.detach() ** 2).sum(1 - member.dim)
    expected = energy.sqrt()
    torch.testing.assert_close(
        score("group_norm", model, graph)[axis.name], expected / expected.mean()
    )


def test_positions_of_no_channel_are_left_out():
    member = Member("w", 1, "in", np.array([-1, 0, 1, 0, 1, -1]))
    tensor = torch.arange(12.0).reshape(2, 6)
    assert to_channels(tensor, member, 2).tolist() == [1 + 3 + 7 + 9, 2 + 4 + 8 + 10]
    vectors = as_vectors(tensor, member, 2)
    assert vectors.tolist() == [[1, 7, 3, 9], [2, 8, 4, 10]]


def test_an_unknown_name_is_answered_with_near_ones(net, batches):
    graph = trace(net, batches[0][0])
    with pytest.raises(ConfigError, match="did you mean taylor"):
        score("tailor", net, graph)


@pytest.mark.parametrize("name", DATA)
def test_data_driven_criteria_say_what_they_need(net, batches, name):
    graph = trace(net, batches[0][0])
    with pytest.raises(ConfigError, match=r"was given none.*l2"):
        score(name, net, graph)
    with pytest.raises(ConfigError, match=r"which prune\(\) takes none of.*l2.*prune_to_budget"):
        prune2deploy.prune(net, batches[0][0], importance=name)
    with pytest.raises(ConfigError, match=r"holds no batch|at least one sample"):
        score(name, net, graph, [])


def test_another_model_than_the_traced_one_is_refused(net, batches):
    graph = trace(net, batches[0][0])
    net.conv = nn.Conv2d(3, 7, 3)
    with pytest.raises(ConfigError, match=r"conv.weight is of shape"):
        score("l2", net, graph)


class Mixing(nn.Module):
    """Attention and a recurrent layer, which have several biases each."""

    def __init__(self):
        super().__init__()
        self.embed, self.attend = nn.Linear(6, 16), nn.MultiheadAttention(16, 2, batch_first=True)
        self.steps, self.out = nn.LSTM(16, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        return self.out(self.steps(self.attend(x, x, x, need_weights=False)[0])[0])


def test_no_bias_counts_whatever_it_is_called():
    model = Mixing().eval()
    subject = Subject(model, trace(model, torch.randn(2, 5, 6)))
    axes = subject.graph.prunable
    held = {member.tensor for axis in axes for member in axis.members}
    assert {"attend.in_proj_bias", "steps.bias_ih_l0", "steps.bias_hh_l0"} <= held
    counted = {member.tensor for axis in axes for member, _ in subject.counted(axis)}
    assert {name for name in held if "bias" not in name} == counted


@pytest.mark.parametrize("name", ["l1", "l2", "group_norm", "lamp", "taylor", "fisher", "hessian"])
def test_small_weights_in_half_precision_are_scored_as_in_single(name):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    with torch.no_grad():
        net[0].weight *= 1e-3
        net[2].weight *= 1e-3
    half, x = copy.deepcopy(net).half(), torch.randn(4, 32)
    exact = copy.deepcopy(half).float()
    labels = torch.tensor([0, 1, 2, 3])
    found = score(name, half, trace(half, x.half()), [((x.half(),), labels)])["0"]
    expected = score(name, exact, trace(exact, x), [((x,), labels)])["0"]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02 * float(expected.mean()))


def test_scores_do_not_depend_on_the_default_type():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(2, 4)
    graph = trace(net, x)
    wanted = {name: score(name, net, graph) for name in ("l2", "lamp")}
    torch.set_default_dtype(torch.float64)
    try:
        for name, scores in wanted.items():
            for axis, values in score(name, net, graph).items():
                assert values.dtype == torch.float32 and torch.equal(values, scores[axis])
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("labels", [torch.zeros(4), torch.zeros(4, dtype=torch.int64)])
def test_labels_that_are_no_classes_are_not_taken_for_them(labels):
    """Of a single score, cross-entropy is always 0: all channels would be equal."""
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)).eval(), torch.randn(4, 4)
    graph = trace(net, x)
    found = score("taylor", net, graph, [((x,), labels)])["0"]
    assert torch.equal(found, score("taylor", net, graph, [((x,), None)])["0"])
    assert found.min() < found.max()
