"""What is accepted in lower precision still classifies, and what does not is not accepted."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from prune2deploy.calibration import first
from prune2deploy.exporting import parity, quantize, ranges
from prune2deploy.exporting.export import to_onnx
from prune2deploy.search import lowering
from prune2deploy.search.lowering import LoweringOptions

ALLOWED = 0.02  # of top-1 accuracy: 7 of 360 pictures


@pytest.fixture(scope="module")
def digits():
    """Batches to train and calibrate on, and batches that nothing is fitted on."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    images = torch.tensor(bunch.images / 16.0, dtype=torch.float32)[:, None]
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return [
        [((images[rows],), labels[rows]) for rows in part.split(32)]
        for part in (order[:1437], order[1437:])
    ]


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """The fp32 file of a net that was trained, and its accuracy."""
    torch.manual_seed(0)
    layers = []
    for given, made in ((1, 16), (16, 32), (32, 32)):
        conv = nn.Conv2d(given, made, 3, padding=1, bias=False)
        layers += [conv, nn.BatchNorm2d(made), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    optimiser = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(4):
        for (pictures,), labels in digits[0]:
            optimiser.zero_grad()
            nn.functional.cross_entropy(net(pictures), labels).backward()
            optimiser.step()
    path = tmp_path_factory.mktemp("net") / "net.onnx"
    to_onnx(net.eval(), (torch.rand(1, 1, 8, 8),), path, dynamic_batch=True)
    accuracy, count = lowering.top1(path, digits[1])
    assert accuracy > 0.9 and count == 360, "an accuracy that can be lost"
    return path, accuracy


@pytest.mark.parametrize(("kind", "recipe"), [("fp16", ""), ("int8", "cpu"), ("int8", "tensorrt")])
def test_what_is_accepted_keeps_its_accuracy_on_other_pictures(
    trained, digits, tmp_path, kind, recipe
):
    path, before = trained
    made = lowering.lower(
        path, tmp_path / "low.onnx", LoweringOptions(kind, recipe or "cpu", digits[0])
    )
    assert made.passed and made.parity.error <= parity.TOLERANCE[kind]
    after, _ = lowering.top1(tmp_path / "low.onnx", digits[1])
    assert before - after <= ALLOWED


def test_the_tolerance_lies_where_accuracy_goes(trained, digits, tmp_path):
    """Spoilt ranges: whatever is accepted keeps its accuracy, and some that is refused does not."""
    path, before = trained
    seen = ranges.calibrate(path, digits[0])
    samples = list(ranges.feeds(path, first(digits[0], 8)))
    accepted, refused = [], []
    for factor in (0.2, 0.5, 1.0, 2.0, 4.0, 16.0):
        spoilt = {n: (factor * low, factor * high) for n, (low, high) in seen.ranges.items()}
        file = tmp_path / f"{factor}.onnx"
        quantize.quantize(path, file, replace(seen, ranges=spoilt), "tensorrt")
        runners = (parity.onnx_runner(path), parity.onnx_runner(file))
        passed = parity.compare(*runners, samples, precision="int8").passed
        drop = before - lowering.top1(file, digits[1])[0]
        (accepted if passed else refused).append(drop)
    assert accepted and max(accepted) <= ALLOWED
    assert refused and max(refused) > 0.2


def test_max_drop_holds_on_real_labels(trained, digits, tmp_path):
    path, _ = trained
    options = LoweringOptions("int8", "tensorrt", digits[0], max_drop=0.005)
    made = lowering.lower(path, tmp_path / "low.onnx", options)
    assert made.passed and made.top1_fp32 - made.top1 <= 0.005
    assert made.scored >= 500
