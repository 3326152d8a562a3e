"""The step is read off staircases of known step, and off real kernels."""

import itertools

import numpy as np
import onnx
import pytest

from prune2deploy.plan.alignment import (
    FAMILIES,
    ROUNDS,
    WIDTHS,
    channel_multiple,
    probe_alignment,
    read_staircase,
    write_probe,
)


def times(step, noise=0.0, cliff=1.0, seed=0):
    rng = np.random.default_rng(seed)
    return {
        w: (5e4 + 2e4 * -(-w // step) * step) * (cliff if w % 4 else 1) * (1 + noise * rng.random())
        for w in WIDTHS
    }


@pytest.mark.parametrize("step", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("noise", [0.0, 0.01])
def test_the_step_of_a_staircase_is_found(step, noise):
    for seed in range(20):
        assert read_staircase("conv3x3", times(step, noise, seed=seed)).step == step


def test_a_cliff_at_odd_widths_does_not_hide_the_step():
    found = read_staircase("conv3x3", times(16, 0.01, cliff=1.6))
    assert found.cliff
    assert found.step == 16
    assert channel_multiple([read_staircase("conv3x3", times(1, cliff=1.6))]) == 4


def test_the_coarsest_family_decides():
    steps = [read_staircase(f, times(s)) for f, s in (("conv3x3", 16), ("matmul", 1))]
    assert channel_multiple(steps) == 16
    assert channel_multiple([]) == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_probe_models_are_valid_and_have_the_width(family, tmp_path):
    write_probe(family, 72, tmp_path / "m.onnx")
    model = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert any(72 in weight.dims for weight in model.graph.initializer)


class Store(dict):
    def staircase(self, family):
        return self.get(family)

    def add_staircase(self, family, staircase):
        self[family] = dict(staircase)


def test_a_probed_device_is_not_timed_again(tmp_path):
    calls, store, told = [], Store(), []

    def time_ns(path):
        calls.append(path)
        return times(8)[int(path.stem.split("-")[1])]

    first = probe_alignment(time_ns, tmp_path, store=store, tell=lambda *n: told.append(n))
    many = ROUNDS * len(WIDTHS) * len(FAMILIES)
    assert len(calls) == many and told[-1] == (many, many)
    assert probe_alignment(time_ns, tmp_path, store=store) == first
    assert len(calls) == many
    assert [(one.family, one.step) for one in first] == [(family, 8) for family in FAMILIES]


def test_what_hangs_on_one_round_alone_is_told_and_not_kept(tmp_path):
    """A load over two of three rounds, on half of the widths."""
    calls, store = itertools.count(), Store()
    busy = [True]

    def time_ns(path):
        turn, place = divmod(next(calls), len(WIDTHS))
        loaded = busy[0] and turn % ROUNDS and place % 2
        return times(16)[int(path.stem.split("-")[1])] * (1.5 if loaded else 1.0)

    first = probe_alignment(time_ns, tmp_path, store=store)
    assert {(one.step, one.sure) for one in first} == {(16, False)} and not store
    busy[0] = False
    second = probe_alignment(time_ns, tmp_path, store=store)
    assert {(one.step, one.sure) for one in second} == {(16, True)}
    assert set(store) == set(FAMILIES)


@pytest.mark.parametrize("step", [1, 16])
@pytest.mark.parametrize("begun", range(0, 20, 3))
def test_what_disturbs_the_host_for_a_while_does_not_make_steps(step, begun, tmp_path):
    """A load that comes and goes: every width is spoilt at times, none of them always."""
    calls = itertools.count(begun)

    def time_ns(path):
        loaded = next(calls) % 20 < 6
        return times(step)[int(path.stem.split("-")[1])] * (1.5 if loaded else 1.0)

    assert {one.step for one in probe_alignment(time_ns, tmp_path)} == {step}
