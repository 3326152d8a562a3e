"""Operators of real engines are recognised by their shapes."""

import numpy as np
import pytest
import torch
from torch import nn

from prune2deploy import target
from prune2deploy.backends import registry
from prune2deploy.exporting import export, simplify
from prune2deploy.graph import trace
from prune2deploy.plan.latency_model import Build, fit
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.surgery.slicing import apply

pytestmark = pytest.mark.ort


class Net(nn.Module):
    """A residual sum, a concatenation, a depthwise convolution and a classifier."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 3, 2, 1)
        self.one = nn.Conv2d(64, 96, 3, 1, 1)
        self.two = nn.Conv2d(96, 64, 1)
        self.deep = nn.Conv2d(64, 64, 3, 1, 1, groups=64)
        self.three = nn.Conv2d(128, 80, 1)
        self.head = nn.Linear(80, 10)

    def forward(self, x):
        x = self.stem(x).relu()
        x = x + self.two(self.one(x).relu())
        x = self.three(torch.cat([x, self.deep(x).relu()], 1)).relu()
        return self.head(x.mean((2, 3)))


def profile(module, inputs, folder):
    where = target.load("ort")
    backend = registry.for_target(where)
    exported = export.to_onnx(module, inputs, folder / "exported.onnx")
    report = simplify.simplify(exported, folder / "model.onnx")
    engine = backend.build(report.path, where, folder / "engine")
    feeds = {"input": inputs[0].numpy()}
    return backend.profile(engine, where, feeds, 3)


def test_every_operator_of_onnx_runtime_is_matched(tmp_path):
    torch.manual_seed(0)
    module, inputs = Net().eval(), (torch.randn(1, 3, 32, 32),)
    graph = trace(module, inputs)
    builds = [Build({}, profile(module, inputs, tmp_path / "base"))]
    for number, counts in enumerate(probes(graph, 3, multiple=16)):
        plan = Plan({name: tuple(range(kept)) for name, kept in counts.items()})
        pruned = apply(module, graph, plan, inputs)
        builds.append(Build(counts, profile(pruned, inputs, tmp_path / str(number))))
    model = fit(graph, builds, multiple=16)
    assert model.unmatched == ()
    assert model.method == "profiles"
    convolutions = [o for o in model.operators if "Conv" in o.kind]
    layers = [layer for layer in graph.layers if layer.operator == "convolution"]
    free = {axis.name for axis in graph.prunable}
    assert [o.axes for o in convolutions] == [layer.macs.axes & free for layer in layers]
    sizes = graph.sizes({})
    works = [o.work.macs(sizes) for o in convolutions]
    assert works == [layer.macs(sizes) for layer in layers]
    for build in builds:
        total = sum(operator.ns for operator in build.profile) / 1e6
        assert np.isfinite(model.operators_ms(build.counts))
        assert model.operators_ms(build.counts) == pytest.approx(total, rel=0.8)
