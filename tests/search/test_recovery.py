"""Training that loses on samples held back is dropped; a caller's own is taken as it is."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prune2deploy.calibration import from_dataset
from prune2deploy.graph import trace
from prune2deploy.plan.plan import Plan
from prune2deploy.recover import FinetuneOptions, evaluate, finetune
from prune2deploy.search.job import Job
from prune2deploy.search.recovery import recovered
from prune2deploy.surgery.slicing import apply

CENTRES = 2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(99))
EXAMPLE = (torch.zeros(1, 8),)


def blobs(count, seed):
    dice = torch.Generator().manual_seed(seed)
    points = [(CENTRES[i % 3] + torch.randn(8, generator=dice), i % 3) for i in range(count)]
    return from_dataset(points, EXAMPLE, batch=30)


@pytest.fixture(scope="module")
def job():
    torch.manual_seed(5)
    network = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 3)).eval()
    options = FinetuneOptions(epochs=6, device="cpu")
    module = finetune(network, None, blobs(240, 0), options).module
    return Job(module, EXAMPLE, None, None, blobs(240, 0), unseen=blobs(60, 7))


def spoiled(module):
    """What a rate that is too high makes of it."""
    with torch.no_grad():
        for weight in module.parameters():
            weight.copy_(torch.randn_like(weight))


def outcome(job, train, *, trains=True):
    graph = trace(job.module, EXAMPLE)
    plan = Plan({graph.prunable[0].name: tuple(range(4))})
    module = apply(job.module, graph, plan, EXAMPLE)
    return recovered(replace(job, finetune=train), graph, plan, module, trains=trains)


def test_training_that_loses_is_dropped_and_told(job):
    fitted, notes = outcome(job, None, trains=False)
    assert len(notes) == 1 and "layers were fitted" in notes[0]
    kept, notes = outcome(job, spoiled)
    assert "dropped" in notes[1] and "on 60 samples held back" in notes[1]
    for name, value in fitted.state_dict().items():
        assert torch.equal(value, kept.state_dict()[name])
    good = evaluate(kept, blobs(300, 11)).top1
    taken, notes = outcome(replace(job, unseen=None), spoiled)
    assert len(notes) == 1 and evaluate(taken, blobs(300, 11)).top1 < good - 0.2


def test_training_that_helps_is_kept(job):
    alone = replace(job, batches=None)  # nothing is reconstructed
    before, _ = outcome(alone, None, trains=False)
    options = FinetuneOptions(epochs=4, device="cpu")
    trained, notes = outcome(
        alone, lambda module: finetune(module, None, blobs(240, 0), options).module
    )
    assert len(notes) == 1 and notes[0].startswith("trained; top-1 on 60 samples")
    assert evaluate(trained, blobs(300, 11)).top1 > evaluate(before, blobs(300, 11)).top1


def test_what_misses_the_budget_is_not_trained(job):
    def fails(module):
        raise AssertionError("trained")

    outcome(job, fails, trains=False)
