"""Training is kept where it helps on samples that it has not seen."""

import pytest
import torch
from torch import nn

from prune2deploy.calibration import from_dataset
from prune2deploy.errors import ConfigError
from prune2deploy.recover import FinetuneOptions, finetune
from prune2deploy.recover.judging import LEAST, MOST, ONE_IN, judged, parted

CENTRES = 2 * torch.randn(3, 8, generator=torch.Generator().manual_seed(99))


def blobs(count=240, seed=0, labelled=True):
    """Three clouds of points in eight dimensions."""
    dice = torch.Generator().manual_seed(seed)
    points = [(CENTRES[i % 3] + torch.randn(8, generator=dice), i % 3) for i in range(count)]
    return from_dataset(
        points if labelled else [x for x, _ in points], (torch.zeros(1, 8),), batch=30
    )


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


@pytest.fixture(scope="module")
def unpruned():
    return finetune(network(5), None, blobs(), FinetuneOptions(epochs=6, device="cpu")).module


@pytest.mark.parametrize("labelled", [True, False])
def test_the_better_one_is_told_with_and_without_labels(unpruned, labelled):
    held, poor = blobs(60, seed=7, labelled=labelled), network(1)
    good = judged(poor, unpruned, unpruned, held)
    assert good.better and good.after.top1 > 0.9 > good.before.top1
    assert good.labelled is labelled and good.before.samples == good.after.samples == 60
    bad = judged(unpruned, poor, unpruned, held)
    assert not bad.better and (bad.before, bad.after) == (good.after, good.before)
    assert ("agreement with the unpruned model" in bad.text()) is not labelled
    assert f"on 60 samples held back from it: {bad.before.top1:.1%} before" in bad.text()
    assert "dropped" in bad.text() and "dropped" not in good.text()


def test_what_changed_nothing_is_not_better_and_surer_answers_are(unpruned):
    held = blobs(60, seed=7)
    assert not judged(unpruned, unpruned, unpruned, held).better

    class Times(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.inner, self.factor = unpruned, factor

        def forward(self, x):
            return self.inner(x) * self.factor

    found = judged(Times(0.1), Times(0.5), unpruned, held)
    assert found.before.top1 == found.after.top1 and found.better


def test_no_sample_is_on_both_sides_and_none_is_lost():
    batches = blobs(240)
    training, judging = parted(batches)
    assert judging.count == 240 // ONE_IN and training.count + judging.count == 240
    assert set(training.chosen) | set(judging.chosen) == set(batches.chosen)
    assert len({batches.sha256, training.sha256, judging.sha256}) == 3
    assert sum(len(labels) for _, labels in judging) == judging.count
    assert parted(blobs(ONE_IN * LEAST - 1))[1] is None
    assert parted(blobs(ONE_IN * LEAST))[1].count == LEAST
    assert parted(blobs(ONE_IN * MOST + 80))[1].count == MOST


def test_what_gives_no_class_scores_is_refused(unpruned):
    with pytest.raises(ConfigError, match="class scores"):
        judged(nn.Unflatten(1, (2, 4)), unpruned, unpruned, blobs(30))
