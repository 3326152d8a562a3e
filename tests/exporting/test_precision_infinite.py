"""Values that are infinite on purpose: what masks attention."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from prune2deploy.exporting import activations
from prune2deploy.exporting.export import to_onnx
from prune2deploy.exporting.precision import Int8Options, to_fp16, to_int8
from prune2deploy.exporting.ranges import METHODS
from prune2deploy.exporting.simplify import simplify


class Causal(nn.Module):
    """One block of a decoder; what lies ahead is masked by minus infinity."""

    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        made = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return x + self.out(made.transpose(1, 2).flatten(2))


@pytest.fixture
def causal(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(Causal(), Causal()).eval()
    path = to_onnx(model, (torch.randn(1, 6, 16),), tmp_path / "causal.onnx")
    return simplify(path, path).path


def rows(count):
    return [((torch.randn(count, 6, 16),), None)]


def masking(path):
    """Nodes that make the scores infinite."""
    feed = {"input": torch.randn(1, 6, 16).numpy()}
    ends = activations.extremes(path, [feed])
    infinite = {name for name, (low, _) in ends.items() if low == -np.inf}
    nodes = activations.load_named(path).graph.node
    return {node.name for node in nodes if infinite & set(node.output)}


def test_infinity_is_a_number_of_fp16(causal, tmp_path):
    assert len(masking(causal)) == 2
    report = to_fp16(causal, tmp_path / "half.onnx")
    assert report.passed and report.kept == ()


@pytest.mark.parametrize("method", METHODS)
def test_int8_keeps_the_masking_nodes_in_fp32_and_no_other_of_their_kind(causal, tmp_path, method):
    report = to_int8(causal, tmp_path / "q.onnx", rows(8), Int8Options(method=method))
    assert report.passed
    assert set(report.kept) == masking(causal), "residual additions are quantised"


def test_infinite_values_that_agree_are_no_error(causal, tmp_path):
    half = to_fp16(causal, tmp_path / "half.onnx").path
    feed = {"input": torch.randn(1, 6, 16).numpy()}
    jumps = activations.error_jumps(causal, half, [feed])
    assert masking(causal) <= jumps.keys()
    assert np.isfinite(list(jumps.values())).all()
    assert 0 < max(jumps.values()) < 0.01


def test_finite_extremes_leave_infinite_values_out(causal):
    feed = {"input": torch.randn(1, 6, 16).numpy()}
    whole = activations.extremes(causal, [feed])
    finite = activations.extremes(causal, [feed], finite=True)
    assert whole.keys() == finite.keys()
    for name, (low, high) in whole.items():
        if np.isinf(low):
            assert -20 < finite[name][0] <= 0 <= finite[name][1] < 20
        else:
            assert finite[name] == (low, high)
