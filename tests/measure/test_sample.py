import dataclasses
import importlib
import itertools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from prune2deploy.backends.base import Sample, Session
from prune2deploy.errors import ConfigError, MeasureError
from prune2deploy.journal import encode
from prune2deploy.measure import samples as raw
from prune2deploy.measure import summary
from prune2deploy.measure.clock import Clock, SimulatedClock
from prune2deploy.measure.deadline import Goal
from prune2deploy.measure.sample import WARM_RUNS, Sampler
from prune2deploy.target import MeasurePolicy

MS = 1_000_000


class Fake(Session):
    """Takes what a function of the run number says."""

    inputs = outputs = ()

    def __init__(self, cost):
        self.cost = cost
        self.runs = 0
        self.closed = False

    def run(self, feeds):
        raise NotImplementedError

    def prepare(self, feeds):
        pass

    def time_once(self):
        ns = round(self.cost(self.runs))
        self.runs += 1
        return Sample(ns, ns)

    def close(self):
        self.closed = True


class ManualClock(SimulatedClock, Clock):
    """Like a real one, but time passes only by what sessions say and by sleeping."""

    def __init__(self):
        super().__init__()
        self.slept = 0

    def sleep(self, ns):
        self.slept += ns
        super().sleep(ns)


def sampler(make_target, costs, policy=None, clock=None):
    opened = []

    def opener(cost):
        def open_it():
            opened.append(Fake(cost))
            return opened[-1]

        return open_it

    target = dataclasses.replace(
        make_target("null"), measure=policy or MeasurePolicy(min_seconds=2.0)
    )
    found = Sampler([opener(c) for c in costs], target, clock or ManualClock(), simulated=False)
    return found, opened, target


def noisy(ns, seed, spread=0.01):
    random = np.random.default_rng(seed)
    return lambda run: ns * float(np.exp(spread * random.standard_normal()))


def test_a_known_ratio_comes_out_with_everything_kept(make_target, tmp_path):
    clock = ManualClock()
    costs = [noisy(4 * MS, 0), noisy(10 * MS, 1), noisy(10 * MS, 2)]
    taker, opened, target = sampler(make_target, costs, clock=clock)
    samples = taker.collect(None)
    assert len(samples.candidate) == len(samples.reference) == len(samples.twin)
    assert len(samples.block) == len(samples.candidate) >= 30
    assert samples.notes["stopped"] == "precise"
    assert clock.now() >= 2e9
    assert (samples.noise[:, 0] >= 100 * MS * 0.9).all()
    assert all(session.closed for session in opened)
    found = summary.summarise(samples, target)
    assert found.ratio == pytest.approx(0.4, rel=0.01)
    assert found.ratio_ci95[0] < 0.4 < found.ratio_ci95[1]
    assert found.control_ratio == pytest.approx(1.0, abs=0.01)
    assert found.reference.p50_ms == pytest.approx(10, rel=0.01)
    assert found.candidate.p50_ms == pytest.approx(4, rel=0.02)
    assert found.clock == "cpu"
    assert "throttled" not in found.flags and "control off" not in found.flags
    path = tmp_path / "raw" / "samples.npz"
    raw.save(samples, path)
    again = summary.summarise(raw.load(path), target)
    assert again == found
    assert [p.name for p in path.parent.iterdir()] == ["samples.npz"]


@pytest.mark.parametrize(("factor", "wrong"), [(1.0, False), (1.1, True)])
def test_two_copies_of_one_engine_that_differ_are_told(make_target, monkeypatch, factor, wrong):
    module = importlib.import_module("prune2deploy.measure.compare")
    costs = [noisy(factor * 10 * MS, 0), noisy(10 * MS, 1)]
    taker, _, target = sampler(make_target, costs)
    monkeypatch.setattr(module, "_take", lambda *given: taker.collect(None))
    found = module.single(None, target)
    assert found.control_ratio == pytest.approx(factor, rel=0.01)
    assert ("control off" in found.flags) is wrong


def test_every_block_has_sessions_of_its_own(make_target):
    taker, opened, _ = sampler(make_target, [noisy(5 * MS, 0), noisy(5 * MS, 1)])
    samples = taker.collect(None)
    assert len(opened) == 2 * (len(samples.noise) + 1)  # one more pair for warming up
    assert all(session.runs > WARM_RUNS for session in opened)


@pytest.mark.parametrize(
    ("first", "later", "reopened", "sessions"),
    [(5.0, 0.01, True, None), (5.0, 5.0, False, 4), (20.0, 20.0, False, 2)],
)
def test_loading_libraries_does_not_count_as_opening(make_target, first, later, reopened, sessions):
    clock, policy = ManualClock(), MeasurePolicy(min_seconds=2.0, max_seconds=60.0)
    taker, opened, _ = sampler(
        make_target, [noisy(5 * MS, 0), noisy(5 * MS, 1)], policy=policy, clock=clock
    )

    def slow(opener):
        def open_it():
            clock.ran(round(1e9 * (first if len(opened) < 2 else later)))
            return opener()

        return open_it

    taker._openers = [slow(opener) for opener in taker._openers]
    samples = taker.collect(None)
    assert samples.notes["reopened"] is reopened
    assert sessions is None or len(opened) == sessions


def test_the_first_slow_runs_are_not_samples(make_target):
    def cost(run):
        return (3 if run < WARM_RUNS else 1) * 5 * MS

    taker, _, _ = sampler(make_target, [cost, cost])
    samples = taker.collect(None)
    assert samples.notes["warm"] is True
    assert samples.candidate[:, 0].max() == 5 * MS


def test_the_time_cap_holds(make_target):
    policy = MeasurePolicy(half_width=0.0001, min_seconds=1.0, max_seconds=3.0)
    clock = ManualClock()
    taker, _, target = sampler(
        make_target, [noisy(20 * MS, 0, 0.2), noisy(20 * MS, 1, 0.2)], policy, clock
    )
    samples = taker.collect(None)
    assert samples.notes["stopped"] == "time"
    assert clock.now() < 5e9
    assert "wide interval" in summary.summarise(samples, target).flags


def test_a_device_that_heats_up_is_cooled_and_measured_again(make_target):
    clock = ManualClock()
    heat = {"until": 0}

    def cost(run):
        seconds = (clock.now() - heat["until"]) / 1e9
        return 5 * MS * (1 + (0.05 * seconds if clock.slept == 0 else 0))

    taker, _, _ = sampler(make_target, [cost, cost], MeasurePolicy(min_seconds=4.0), clock)
    samples = taker.collect(None)
    assert clock.slept > 0
    assert samples.notes["cooled"] is True


def test_a_heartbeat_is_given_in_every_stage(make_target):
    beats = []
    taker, _, _ = sampler(make_target, [noisy(5 * MS, 0), noisy(5 * MS, 1)])
    taker._heartbeat = lambda: beats.append(taker._clock.now())
    samples = taker.collect(None)
    assert len(beats) >= len(samples.noise) + 2  # opening, warming up, and every block
    assert max(later - beat for beat, later in itertools.pairwise(beats)) < 1e9


def replay(make_target, cpu_share=1.0, delay=0, threads=1, device_ns=0):
    """Thirty blocks of four pairs: candidate 5 ms, reference 10 ms of CPU time."""
    random = np.random.default_rng(0)
    target = make_target("null", threads=threads)

    def rows(ns):
        cpu = ns * np.exp(0.01 * random.standard_normal(120))
        return np.stack([cpu / cpu_share, cpu, np.full(120, device_ns)], axis=1).astype(np.int64)

    candidate, reference = rows(5 * MS), rows(10 * MS)
    noise = np.zeros((30, 6), dtype=np.int64)
    noise[:, 0] = 4 * 15 * MS
    noise[:, 3] = delay
    samples = raw.Samples(
        candidate,
        reference,
        np.empty((0, 3), dtype=np.int64),
        np.repeat(np.arange(30), 4),
        noise,
        {"stopped": "precise", "warm": True},
    )
    return samples, target


def test_cpu_time_counts_when_the_thread_does_all_the_work(make_target):
    samples, target = replay(make_target)
    assert summary.choose_clock(samples, target) == raw.CPU


def test_cpu_time_counts_on_a_contended_host_whose_kernel_tells_the_wait(make_target):
    waited = 4 * 15 * MS  # as long as it ran
    samples, target = replay(make_target, cpu_share=0.5, delay=waited)
    assert summary.choose_clock(samples, target) == raw.CPU
    found = summary.summarise(samples, target)
    assert "noisy host" in found.flags
    assert found.disturbance["cpu_share"] == pytest.approx(0.5, abs=0.01)
    assert found.disturbance["waiting"] == pytest.approx(1.0)
    assert found.undisturbed_p50_ms is None
    assert found.reference.p50_ms == pytest.approx(20, rel=0.01)


def test_runs_that_never_waited_are_known_among_those_that_did(make_target):
    samples, target = replay(make_target)
    samples.reference[::2, raw.WALL] *= 3
    found = summary.summarise(samples, target)
    assert found.undisturbed_p50_ms == pytest.approx(10, rel=0.01)
    assert found.reference.p50_ms > 11


def test_wall_time_counts_when_other_threads_do_the_work(make_target):
    samples, target = replay(make_target, cpu_share=0.5, delay=0)
    assert summary.choose_clock(samples, target) == raw.WALL
    samples, target = replay(make_target, threads=4)
    assert summary.choose_clock(samples, target) == raw.WALL


def test_device_time_counts_where_it_is_known(make_target):
    samples, target = replay(make_target, device_ns=7)
    assert summary.choose_clock(samples, target) == raw.DEVICE


def test_what_the_host_takes_beyond_the_device_counts(make_target):
    """Half the device's time is not half the latency where launching takes as long again."""
    samples, target = replay(make_target)
    random = np.random.default_rng(1)
    for rows, device in ((samples.candidate, MS / 2), (samples.reference, MS)):
        rows[:, raw.DEVICE] = device * np.exp(0.002 * random.standard_normal(len(rows)))
        rows[:, raw.WALL] = rows[:, raw.DEVICE] + MS * np.exp(0.2 * random.standard_normal(120))
    found = summary.summarise(samples, target)
    assert found.clock == "device"
    assert found.ratio == pytest.approx(1.5 / 2, rel=0.1)
    assert found.candidate.p50_ms == pytest.approx(found.wall_p50_ms, rel=0.05)
    wide = np.log(found.ratio_ci95[1] / found.ratio_ci95[0])
    assert wide < 0.01  # the host's noise is not in it


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_samples_that_do_not_fit_on_the_disk_are_told_as_that(tmp_path, monkeypatch):
    """In the measuring process too, where they would look like a crash of the runtime."""
    runs = np.arange(3000).reshape(-1, 3)
    samples = raw.Samples(runs, runs, runs, np.arange(1000), np.zeros((1000, 6), dtype=int), {})
    real = tempfile.mkdtemp

    def full(**where):
        folder = real(**where)
        (Path(folder) / "samples.npz").symlink_to("/dev/full")
        return folder

    monkeypatch.setattr(tempfile, "mkdtemp", full)
    with pytest.raises(
        ConfigError, match=r"samples\.npz: the raw samples cannot be written \(No sp"
    ):
        raw.save(samples, tmp_path / "samples.npz")
    assert not list(tmp_path.iterdir())


def test_damaged_sample_files_are_named(tmp_path):
    path = tmp_path / "samples.npz"
    path.write_bytes(b"PK nothing")
    with pytest.raises(MeasureError, match=r"samples\.npz"):
        raw.load(path)


def test_a_high_percentile_is_sampled_until_it_can_be_bounded(make_target):
    costs = [noisy(100 * MS, 0), noisy(100 * MS, 1)]
    policy = MeasurePolicy(min_seconds=1.0, max_seconds=300.0, half_width=0.05)
    plain = sampler(make_target, costs, policy)[0].collect(None)
    taker, _, target = sampler(make_target, costs, policy)
    samples = taker.collect(Goal(1000.0, percentile=99))
    assert len(plain.candidate) < 299 <= len(samples.candidate)
    assert summary.summarise(plain, target).candidate.unbounded == (95, 99)
    assert summary.summarise(samples, target).candidate.unbounded == ()
    assert "too few samples for p99" in summary.summarise(plain, target).flags


def busy(ns, clock, seconds):
    """Up to twice as slow and back every ``seconds``, as beside another program."""
    return lambda run: ns * (1.5 + 0.5 * np.sin(2 * np.pi * clock.now() / 1e9 / seconds))


def test_a_deadline_is_sampled_until_the_milliseconds_are_known(make_target):
    policy = MeasurePolicy(min_seconds=1.0, max_seconds=60.0)
    found = {}
    for name, goal in {"ratio": None, "near": Goal(15.5), "far": Goal(40.0)}.items():
        clock = ManualClock()
        costs = [busy(10 * MS, clock, 1.4), busy(10 * MS, clock, 1.4)]
        taker, _, target = sampler(make_target, costs, policy, clock)
        found[name] = summary.summarise(taker.collect(goal), target)
    assert found["ratio"].stopped == "precise"
    assert found["ratio"].ratio_ci95 == pytest.approx((1, 1), abs=0.01)
    low, high = found["ratio"].candidate.ci95_ms
    assert low < 15.5 < high  # the ratio is known, the milliseconds are not
    assert found["near"].candidate.samples > 3 * found["far"].candidate.samples
    assert found["far"].candidate.ci95_ms[1] < 40


def test_the_interval_of_a_product_has_both_errors():
    low, high = summary.joined((10.0, (9.0, 11.0)), (0.5, (0.49, 0.51)))
    assert low == pytest.approx(5 * np.exp(-np.hypot(np.log(10 / 9), np.log(50 / 49))))
    assert low < 4.5 and 5.5 < high < 5.6
    assert summary.joined((10.0, (0.0, np.inf)), (0.5, (0.49, 0.51))) == (0.0, np.inf)


@pytest.mark.parametrize("seconds", [3, 30, 120])
def test_a_slow_model_gets_a_result_that_json_can_hold(make_target, seconds):
    costs = [noisy(seconds * 1000 * MS, n) for n in range(3)]
    policy = MeasurePolicy(max_seconds=90.0)
    taker, _, target = sampler(make_target, costs, policy)
    found = summary.summarise(taker.collect(Goal(1.0)), target)
    assert len(found.fingerprint) == 0 and found.stopped == "time"
    json.dumps(encode(found), allow_nan=False)
    assert found.ratio_ci95[0] < 1 < found.ratio_ci95[1]
    assert "wide interval" in found.flags
