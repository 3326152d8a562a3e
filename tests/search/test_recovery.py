"""How closely weights are fitted depends on the training that follows."""

import pytest
import torch
from torch import nn

from prune2deploy.calibration import from_dataset
from prune2deploy.errors import ConfigError
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.recover import FinetuneOptions, Training
from prune2deploy.recover.least_squares import LONGEST
from prune2deploy.search import recovery
from prune2deploy.search.job import Job
from prune2deploy.surgery.slicing import apply

EXAMPLE = (torch.zeros(1, 8),)


class Nothing(Training):
    """Training of so many epochs that leaves the module as it is."""

    def __call__(self, module):
        return None


def test_what_training_gives_back_is_of_the_same_types_and_goes_back_to_the_device():
    class Elsewhere(nn.Linear):
        went = ()

        def to(self, *where):
            self.went = where
            return self

    trained, _ = recovery.finetuned(nn.Linear(8, 4), lambda _: Elsewhere(8, 4))
    assert trained.went == (torch.device("cpu"),)
    with pytest.raises(ConfigError, match=r"torch.float16 afterwards, .* in torch.float32"):
        recovery.finetuned(nn.Linear(8, 4), lambda module: module.half())


@pytest.fixture(scope="module")
def case():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    graph = trace(net, EXAMPLE)
    (axis,) = (a for a in graph.prunable if a.size == 64)
    plan = Plan({axis.name: tuple(range(16))})
    dice = torch.Generator().manual_seed(1)
    items = [(torch.randn(8, generator=dice), n % 4) for n in range(256)]
    return net, graph, plan, from_dataset(items, EXAMPLE, batch=16)


@pytest.mark.parametrize(
    ("training", "trains", "short"),
    [
        (None, True, False),
        (lambda module: None, True, True),  # of a length that nobody knows
        (lambda module: None, False, False),  # left out, since the budget is missed
        (3, True, False),  # 48 steps
        (4, True, True),
    ],
)
def test_weights_are_kept_short_before_training_that_settles(case, training, trains, short):
    net, graph, plan, batches = case
    if isinstance(training, int):
        training = Nothing(net, batches, FinetuneOptions(epochs=training))
    job = Job(net, EXAMPLE, None, None, batches, training)
    module = apply(net, graph, plan, EXAMPLE)
    before = module[2].weight.norm()
    after, notes = recovery.recovered(job, graph, plan, module, trains=trains)
    assert "were fitted" in notes[0]
    assert bool(after[2].weight.norm() <= LONGEST * before) is short
