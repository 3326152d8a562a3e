"""A pruned model runs on inputs that take another branch than the example."""

import pytest
import torch
from torch import nn

import prune2deploy
from prune2deploy.errors import PruneError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.copying import copied


def block(inner):
    return nn.Sequential(nn.Linear(8, inner), nn.ReLU(), nn.Linear(inner, 8))


class Branching(nn.Module):
    """One of two blocks, by the values of the input, its number of samples, or always the first."""

    def __init__(self, by):
        super().__init__()
        self.first, self.low, self.high = nn.Linear(6, 8), block(12), block(20)
        self.last = nn.Linear(8, 3)
        self.by = by

    def forward(self, x):
        taken = self.high if self.by(x) else self.low
        return self.last(taken(self.first(x)))


BY_VALUE = {
    "number": lambda x: float(x.mean()) > 0,
    "comparison": lambda x: x.mean() > 0,
    "whole number": lambda x: int((x > 0).sum()) > 3,
}
X = torch.rand(4, 6, generator=torch.Generator().manual_seed(0))
"""Takes the upper branch."""


@pytest.mark.parametrize("by", BY_VALUE)
def test_what_a_branch_out_of_reach_may_meet_stays(by):
    torch.manual_seed(0)
    model = Branching(BY_VALUE[by]).eval()
    graph = trace(model, X)
    assert [axis.size for axis in graph.prunable] == [20]
    assert graph["first"].frozen.startswith("may meet low.0.weight")
    pruned = prune2deploy.prune(model, X, 0.5)
    assert pruned.high[0].out_features == 10
    with torch.no_grad():
        torch.testing.assert_close(pruned(-X), model(-X))
        assert pruned(X).shape == (4, 3)


@pytest.mark.parametrize("by", [lambda x: True, lambda x: len(x) > 2, lambda x: x.dim() > 1])
def test_parts_that_no_input_of_this_kind_reaches_hold_nothing_back(by):
    graph = trace(Branching(by).eval(), X)
    assert sorted(axis.size for axis in graph.prunable) == [8, 8, 20]


@pytest.mark.parametrize("spelt", [False, True])
def test_checks_of_the_input_hold_nothing_back_for_a_vector_that_is_not_used(spelt):
    class Checking(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)
            self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))

        def forward(self, x):
            if not torch.isfinite(x).all() or x.abs().max() > 1e6:
                raise ValueError("no numbers")
            h = self.first(x)
            return self.last(h.view(-1, 2, 4).flatten(1) if spelt else h)

    model = Checking().eval()
    graph = trace(model, X)
    assert sum(axis.size for axis in graph.prunable) in (8, 6)  # one width, or two that make it
    pruned = prune2deploy.prune(model, X, 0.5)
    assert pruned(X).shape == (4, 3) and pruned.get_parameter("last.weight").shape[1] < 8


def test_a_captured_form_does_not_stand_for_code_that_branches():
    model = Branching(BY_VALUE["comparison"]).eval()
    with pytest.raises(PruneError, match=r"leaves 2 parameters out \(low\.0\.weight\)"):
        capture(copied(model, {}), model, trace(model, X), Plan({}))


class Experts(nn.Module):
    """Each expert sees the samples that are sent to it, and is left out where there are none."""

    def __init__(self):
        super().__init__()
        self.first, self.gate = nn.Linear(6, 8), nn.Linear(8, 3)
        self.experts, self.last = nn.ModuleList(block(12) for _ in range(3)), nn.Linear(8, 2)

    def forward(self, x):
        x = self.first(x)
        chosen, total = self.gate(x).argmax(1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            (rows,) = torch.where(chosen == number)
            if rows.numel():
                total = total.index_add(0, rows, expert(x[rows]))
        return self.last(total)


def test_an_expert_that_the_example_does_not_reach_holds_back_what_it_may_meet():
    torch.manual_seed(0)
    model, many = Experts().eval(), 9 * torch.randn(50, 6)
    assert model.gate(model.first(many)).argmax(1).unique().numel() == 3
    graph = trace(model, many)
    assert sorted(axis.size for axis in graph.prunable) == [8, 12, 12, 12]
    graph = trace(model, many[:1])
    assert all(axis.frozen for axis in graph.axes if axis.size in (8, 12))
