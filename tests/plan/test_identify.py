"""Shapes as runtimes show them, with and without weights, rounded up or not."""

import dataclasses

import pytest

from prune2deploy.plan.identify import Identifier
from prune2deploy.plan.pairing import align
from prune2deploy.plan.probes import probes
from prune2deploy.plan.work import signature, weight_position
from prune2deploy.timing import OperatorTiming

from .made import block, chain, const, engine, graph_of, layer, width


def identified(graph, change, number=4):
    plans = [{}, *probes(graph, number, multiple=16)]
    profiles = [[change(o) for o in engine(graph, counts)] for counts in plans]
    identifier = Identifier(graph, plans)
    return {one.name: identifier.identify(one) for one in align(profiles)}


def test_without_weights_the_layer_gives_the_multiply_accumulates():
    graph = chain((64, 128, 64))
    found = identified(graph, lambda o: dataclasses.replace(o, input_shapes=o.input_shapes[:1]))
    for number, one in enumerate(graph.layers):
        assert found[f"op{number}"].work.macs == one.macs


def test_depthwise_work_without_weights_is_linear():
    depthwise = layer("dw", width("a"), const(1), 64)
    depthwise = dataclasses.replace(depthwise, out_width=width("a"))
    graph = graph_of({"a": 64}, [depthwise])
    profiles = [
        [OperatorTiming("dw", "Conv", ((1, n, 8, 8),), ((1, n, 8, 8),), 1.0)] for n in (64, 32, 48)
    ]
    identifier = Identifier(graph, [{}, {"a": 32}, {"a": 48}])
    found = identifier.identify(align(profiles)[0])
    assert [found.work.macs({"a": n}) for n in (16, 32)] == [16 * 9 * 64, 32 * 9 * 64]


def test_channels_shown_in_whole_blocks_are_recognised():
    graph = chain((24, 40, 64))

    def up(shape):
        return tuple(block(d, 16) if i == 1 and d > 3 else d for i, d in enumerate(shape))

    def change(timing):
        if timing.kind != "Add":
            return timing
        shown = (
            tuple(up(s) for s in timing.input_shapes),
            tuple(up(s) for s in timing.output_shapes),
        )
        return dataclasses.replace(timing, input_shapes=shown[0], output_shapes=shown[1])

    found = identified(graph, change)
    for number, name in enumerate(("a0", "a1", "a2")):
        assert found[f"add{number}"].matched
        assert found[f"add{number}"].work.axes == {name}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(1, 32, 8, 8), (64, 32, 3, 3), (64,)], 1),
        ([(1, 32, 8, 8)], None),
        ([(1, 32, 8, 8), (1, 64, 8, 8)], None),  # a sum fused into the convolution
    ],
)
def test_the_weight_is_told_from_a_fused_sum(shapes, expected):
    assert weight_position("Conv", shapes, [(1, 64, 8, 8)]) == expected


def test_signatures_differ_in_what_pruning_does_not_change():
    small, large = ([(const(1), width("a"), const(n), const(n))] for n in (8, 16))
    assert signature("Relu", small, small) == "Relu(1x*x8x8,1x*x8x8)"
    assert signature("Relu", small, small) != signature("Relu", large, large)


def test_an_operator_that_only_later_builds_have_comes_last():
    one = OperatorTiming("a", "Conv", (), (), 1.0)
    extra = OperatorTiming("b", "Reorder", (), (), 1.0)
    again = OperatorTiming("a", "Conv", (), (), 2.0)
    found = align([[one, again], [extra, one, again]])
    assert [(seen.name, sorted(seen.timings)) for seen in found] == [
        ("a", [0, 1]),
        ("a", [0, 1]),
        ("b", [1]),
    ]
