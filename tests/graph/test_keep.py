"""What the user names stays whole; the rest may still be pruned."""

from itertools import accumulate

import pytest
import torch
from torch import nn
from torchvision.models import VisionTransformer, resnet18

import prune2deploy
from prune2deploy.errors import ConfigError, TraceError
from prune2deploy.graph import keep, trace
from prune2deploy.graph.keep import KEPT
from prune2deploy.plan.plan import Plan

from .structures import STRUCTURES


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    return resnet18().eval(), torch.randn(1, 3, 64, 64)


def shapes(module):
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


def test_outputs_of_a_named_layer_keep_their_channels_and_its_inputs_may_go(resnet):
    model, x = resnet
    before = shapes(model)
    after = shapes(prune2deploy.prune(model, x, 0.5, keep=["layer2.0.conv1", "layer3"]))
    for name, shape in before.items():
        if name.startswith(("layer2.0.conv1", "layer3")):
            assert after[name][:1] == shape[:1], name
    assert after["layer2.0.conv1.weight"][1] == before["layer2.0.conv1.weight"][1] // 2
    assert after["layer2.0.conv2.weight"][0] == before["layer2.0.conv2.weight"][0] // 2
    assert after["layer4.0.conv1.weight"][0] == before["layer4.0.conv1.weight"][0] // 2


def test_patterns_name_modules_at_any_depth_tensors_and_axes(resnet):
    graph = trace(*resnet)

    def kept(*patterns):
        return {axis.name for axis in keep(graph, patterns).axes if axis.frozen == KEPT}

    inner = {f"layer{i}.{j}.conv1" for i in (1, 2, 3, 4) for j in (0, 1)}
    assert kept("layer?.*.conv1") == inner
    assert kept("layer4.1.bn1") == {"layer4.1.conv1"}  # its channels are those of the convolution
    assert kept("layer4.1.conv1.weight") == kept("layer4.1.conv1") == {"layer4.1.conv1"}
    shared = max(graph.axes, key=lambda axis: len(axis.members)).name
    assert kept(shared) == {shared}
    assert kept("fc") == set()  # is frozen as an output, and keeps that reason
    assert {axis.name for axis in graph.axes if axis.frozen == KEPT} == set()


def test_a_tied_axis_is_kept_with_the_one_that_was_named():
    tied = [
        (name, graph)
        for name, (build, example, _) in STRUCTURES.items()
        for graph in [trace(build().eval(), example)]
        if graph.ties
    ]
    assert tied
    for name, graph in tied:
        for tie in graph.ties:
            held = keep(graph, [tie[0]])
            assert {axis for axis in tie if held[axis].frozen == KEPT} == set(tie), name


def test_a_block_that_holds_what_is_kept_stays(resnet):
    graph = trace(*resnet)
    names = {block.name for block in graph.blocks}
    around = {"layer1", "layer1.0"}
    assert around | {"layer1.1"} <= names
    assert {block.name for block in keep(graph, ["layer1.0.bn2"]).blocks} == names - around


def test_a_block_that_makes_a_kept_axis_stays_and_those_on_a_kept_stream_may_go():
    torch.manual_seed(0)
    model = VisionTransformer(32, 16, 2, 2, 32, 64).eval()
    graph = trace(model, torch.randn(1, 3, 32, 32))
    paths = {p for name in graph.tensors for p in accumulate(name.split("."), "{}.{}".format)}
    inside = {
        axis.name: {
            block.name
            for block in graph.blocks
            if {m.tensor for m in axis.members if m.role != "in"} <= set(block.weights)
        }
        for axis in graph.prunable
        if axis.name not in paths  # such a name is of a tensor, which keeps its blocks
    }
    assert inside and all(inside.values())
    stream = max(graph.axes, key=lambda axis: len(axis.members)).name
    assert stream == "conv_proj"  # every block adds to it, and none makes all of it
    for name, blocks in {**inside, stream: set()}.items():
        left = {block.name for block in keep(graph, [name]).blocks}
        assert left == {block.name for block in graph.blocks} - blocks, name


def test_a_plan_may_not_cut_what_is_kept(resnet):
    graph = keep(trace(*resnet), ["layer1.0.conv1"])
    with pytest.raises(prune2deploy.PlanError, match=KEPT):
        Plan({"layer1.0.conv1": (0, 1)}).check(graph)


def test_a_name_that_fits_nothing_is_an_error_with_the_nearest(resnet):
    with pytest.raises(ConfigError, match=r"found 'layr1'.*did you mean .*layer1"):
        keep(trace(*resnet), ["fc", "layr1"])


def test_layers_without_weights_have_nothing_to_keep(resnet):
    for pattern in ("relu", "layer?.*.relu"):
        with pytest.raises(ConfigError, match=r"without weights.*nothing to keep"):
            keep(trace(*resnet), [pattern])


def test_a_lone_string_is_one_name(resnet):
    model, x = resnet
    one = prune2deploy.prune(model, x, 0.5, keep="layer1")
    assert shapes(one) == shapes(prune2deploy.prune(model, x, 0.5, keep=["layer1"]))


@pytest.mark.parametrize("keep", ["*", ["0"]])
def test_where_everything_is_kept_there_is_nothing_to_prune(tmp_path, keep):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 3)).eval()
    x = torch.randn(1, 3, 8, 8)
    with pytest.raises(TraceError, match=KEPT):
        prune2deploy.prune(net, x, keep=keep)
    with pytest.raises(TraceError, match=KEPT):
        prune2deploy.prune_to_budget(
            net, x, target="ort", speedup=1.1, keep=keep, run_dir=tmp_path / "run"
        )


def test_a_model_without_prunable_axes_is_refused():
    with pytest.raises(TraceError, match="model output"):
        prune2deploy.prune(nn.Linear(3, 8).eval(), torch.randn(1, 3))
