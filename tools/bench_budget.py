"""Ours against Torch-Pruning: accuracy at equal measured latency, builds, and predictions.

Protocol, fixed before its first full run; what earlier tries had shown, and what was changed
since, is said in docs/benchmarks.md.

Everywhere: target ``ort`` (one thread). A latency is the ratio to the dense model, taken by
``prune2deploy.measure`` from interleaved runs; it is never a prediction. In parts a, b and d the
wanted half-width of its interval is 1.5 %, over at least one second, without the A/A control;
in part c the target's own policy holds. Each set of widths is measured once and the value kept for
whoever comes to the same widths. Torch-Pruning is ``BasePruner`` with one step and its defaults
but for what is named, the classifier ignored; ``round_to`` is the channel multiple of the
target, the same as ours. To reach a latency it halves the pruning ratio between 0 and 0.95 on
measured latency, at most ``BUILDS`` builds a point; ours may correct as often, in part a up to
``ROUNDS`` times where its latency is not the peer's yet. A search stops at the first build within
[0.98, 1.00] of the wanted latency. What is delivered is the slowest build of any search of this
method on this network that does not exceed the wanted latency.

(a) ``DigitNet`` (see ``bench_digits``) trained on 800 distorted digits until it gains nothing more
    (``EPOCHS``), tested on the other 997 in five distortions each; each of
    ``--seeds`` decides data, weights and order. Methods of the peer: uniform and global, each
    with and without ``round_to``, channels by Taylor on 512 training samples; wanted: .65, .5,
    .4, .3 of the dense latency. A ratio moves
    latency in steps, so the peer seldom arrives there. Ours is therefore asked for the latency
    that the peer *delivered*, and is never the slower. Where no worthier plan comes within 2 % of
    it, ours goes on with plans that take longer and are worth nearly as much, so that both are
    compared at equal latency. All latencies are measured before any of this training. Ours is
    what the loop does on the same samples: widths by measured sensitivity, plans nearly as good
    compared by their loss, where no training follows; kept in balance by scores where it does;
    channels by Taylor; weights reconstructed, and kept short for more than a few steps of
    training. The peer, which has no such step, gets BatchNorm re-estimation. Both from the same
    512 samples, and then the same fine-tuning with the dense model as teacher, ``FINETUNE``
    epochs in each of ``ORDERS`` orders of the samples, ours at the highest rate that is the
    default for so few steps, the peer, which has more to learn, at ``RATE``; what there is
    without it is told too (0 epochs). Told: top-1 points lost against the dense model, mean over
    orders and seeds. Six probe builds, once for all seeds.
(b) The networks of (a) with planted channels in two of the four blocks: ``dead`` (nothing reads
    them) or ``copied`` (original and copy read at half weight). Wanted of all methods: 1.02 times
    the latency of the network before planting. Recovered as in (a), no fine-tuning. ``*``:
    the latency delivered lies more than 2 % below the one wanted.
(c) resnet18 and mobilenet_v2 (random weights, 128x128), speed-ups 1.6 and 2: builds besides the
    dense one, and wall seconds in all, until the upper end of the measured interval is within the
    budget and the median at or above 97 % of it. Ours: ``prune_to_budget`` as it comes (at most 9
    builds), without what earlier runs have cached. Torch-Pruning: uniform by weight norm, with and
    without ``round_to``, by bisection, at most 12 builds.
(d) Predicted against measured latency without feedback: fitted on the dense build and the first 3
    and 6 of six probes, one plan each for speed-ups 1.3, 1.6, 2 and 3, each measured. DigitNet,
    resnet18 and mobilenet_v2 as in (c); widths by weight norms.

    python tools/bench_budget.py --part a --work w --out a.json
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import json
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from bench_digits import (
    EXAMPLE,
    METHODS,
    PEERS,
    PLAIN,
    TRAINED,
    Case,
    DigitNet,
    Pruner,
    plant,
    recovered,
    torch_pruning,
    train,
)
from bench_tables import shown, table_equal, table_plain, table_planted
from bench_yard import (
    FILL,
    WIDEST,
    Searches,
    Trial,
    Yard,
    delivered,
    even,
    note,
    pooled,
    recalled,
)
from torch import nn

from prune2deploy import api, measure, models, target
from prune2deploy.importance import score
from prune2deploy.plan.allocate import allocate
from prune2deploy.plan.choices import Problem, choices, importance_curves
from prune2deploy.plan.latency_model import fit
from prune2deploy.recover.finetune import RATE
from prune2deploy.target import Target

POINTS = (0.65, 0.5, 0.4, 0.3)
SPEEDUPS = (1.3, 1.6, 2.0, 3.0)
CASES = (("resnet18", 1.6), ("resnet18", 2.0), ("mobilenet_v2", 1.6), ("mobilenet_v2", 2.0))
SIDE = 128
BUILDS, ROUNDS, PEER_BUILDS, PROBES = 8, 3, 12, 6
EPOCHS, FINETUNE = 24, (1, 3)
Row = dict[str, Any]


@dataclass(frozen=True)
class Bench:
    """How much to do, and where.

    Attributes:
        seeds: Of the networks of parts a and b.
        quick: One point, little training, small models: to try the tool out.
        latencies: Whether part a ends when all latencies are measured.
        folder: For engines, trained networks and measured latencies.
        save: Called with the rows so far.
    """

    seeds: tuple[int, ...]
    quick: bool
    latencies: bool
    folder: Path
    save: Callable[[list[Row]], None]

    @property
    def points(self) -> tuple[float, ...]:
        """Latencies that are wanted of the peer in part a."""
        return POINTS[1:2] if self.quick else POINTS

    @property
    def profile(self) -> Target:
        """The target with the short policy of parts a, b and d."""
        found = target.load("ort")
        policy = replace(
            found.measure, half_width=0.015, min_seconds=1.0, max_seconds=30.0, control=False
        )
        return replace(found, measure=policy)

    def cases(self) -> list[Case]:
        """The trained networks."""
        return [train(seed, 2 if self.quick else EPOCHS, self.folder) for seed in self.seeds]


def part_a(bench: Bench) -> list[Row]:
    """Accuracy at the latency that each method of the peer delivers, fine-tuned alike."""
    cases = bench.cases()
    yard = Yard(cases[0].module, EXAMPLE, bench.profile, bench.folder / "plain")
    epochs = FINETUNE[:1] if bench.quick else FINETUNE
    found = {case.seed: searched(bench, case, yard) for case in cases}
    rows: list[Row] = []
    for case in () if bench.latencies else cases:
        searches = found[case.seed]
        ours = [Pruner(method, case, yard) for method in (PLAIN, TRAINED)]
        mine: dict[float, Row] = {}
        for method in PEERS:
            peer = Pruner(method, case, yard)
            for point in bench.points:
                theirs = contest(peer, searches[method], point, epochs)
                if "latency" not in theirs:
                    continue
                limit = theirs["latency"][0]
                if limit not in mine:
                    mine[limit] = own(ours, searches, limit, epochs)
                for row in (theirs, mine[limit]):
                    rows.append({"part": "a", "point": point, "against": method, **row})
                    print(shown(rows[-1]), flush=True)
                bench.save(rows)
    return rows


def searched(bench: Bench, case: Case, yard: Yard) -> Searches:
    """Builds of every method on the way to each of its latencies; kept beside the yard's.

    What an earlier run kept is taken, and with ``latencies`` gone on from.
    """
    kept = yard.folder / f"searches-{case.seed}{'-quick' if bench.quick else ''}.json"
    found = recalled(kept)
    if found and not bench.latencies:
        return found
    if not yard.builds:
        yard.probe(3 if bench.quick else PROBES)
    for method in () if found else PEERS:
        peer = Pruner(method, case, yard)
        found[method] = {point: peer.search(point, BUILDS) for point in bench.points}
    best = [delivered(pooled(found[method]), point) for method in PEERS for point in bench.points]
    limits = sorted({trial.share for trial in best if trial is not None})
    for method in (PLAIN, TRAINED):
        mine, pruner = found.setdefault(method, {}), Pruner(method, case, yard)
        for limit in limits * ROUNDS:
            if limit not in mine or not even(mine, limit):
                mine[limit] = pruner.search(limit, BUILDS, mine.get(limit, ()))
    note(kept, found)
    return found


def own(pruners: Sequence[Pruner], searches: Searches, limit: float, epochs: Sequence[int]) -> Row:
    """What ours delivers for one latency, without and with training to follow, as one row."""
    plain, trained = (
        contest(pruner, searches[pruner.method], limit, many)
        for pruner, many in zip(pruners, ((), epochs), strict=True)
    )
    if "lost" not in plain or "lost" not in trained:
        return {key: value for key, value in trained.items() if key != "lost"}
    return trained | {"lost": trained["lost"] | plain["lost"], "untrained": plain}


def part_b(bench: Bench) -> list[Row]:
    """Accuracy at the latency of the network before planting, without fine-tuning."""
    cases = bench.cases()
    rows: list[Row] = []
    for kind in ("dead", "copied"):
        planted = [plant(case, kind) for case in cases]
        yard = Yard(planted[0].module, EXAMPLE, bench.profile, bench.folder / kind)
        yard.probe(3 if bench.quick else PROBES)
        limit = 1.02 * yard.compare(cases[0].module).ratio
        for case in planted:
            for method in METHODS:
                pruner = Pruner(method, case, yard)
                row = contest(pruner, {limit: pruner.search(limit, BUILDS)}, limit, ())
                rows.append({"part": "b", "point": kind, "wanted": limit, **row})
                print(shown(rows[-1]), flush=True)
                bench.save(rows)
    return rows


def contest(
    pruner: Pruner, searches: Mapping[float, list[Trial]], limit: float, epochs: Sequence[int]
) -> Row:
    """See what the network is worth that one method delivers for one latency."""
    trials = searches[limit]
    best = delivered(pooled(searches), limit)
    row: Row = {"method": pruner.method, "seed": pruner.case.seed, "builds": len(trials)}
    row["trials"] = [(t.share, t.predicted) for t in trials]
    row["dense"] = pruner.case.top1
    if best is None:
        return row
    ours = isinstance(best.setting, Mapping)
    modules = {many: pruner.module(best, many) for many in (0, *epochs)}
    rate = None if ours else RATE
    top1 = {many: recovered(pruner.case, one, many, rate) for many, one in modules.items()}
    return row | {
        "share": best.share / limit,
        "off": best.share < FILL * limit,
        "latency": (best.share, best.low, best.high),
        "lost": {str(many): 100 * (pruner.case.top1 - value) for many, value in top1.items()},
        "setting": dict(best.setting) if ours else best.setting,
        "widths": [p.out_channels for p in modules[0].modules() if isinstance(p, nn.Conv2d)],
    }


def part_c(bench: Bench) -> list[Row]:
    """Builds and wall time until the budget is met."""
    rows: list[Row] = []
    side = 64 if bench.quick else SIDE
    for spec, speedup in CASES[1:2] if bench.quick else CASES:
        loaded = models.load(spec, weights=None, input_size=(side, side), batch=1, seed=0)
        module, inputs = loaded.module, loaded.example_inputs
        started = time.monotonic()
        result = api.prune_to_budget(
            module,
            inputs,
            target="ort",
            speedup=speedup,
            cache=False,
            run_dir=Path(tempfile.mkdtemp(dir=bench.folder)),
        )
        seconds = time.monotonic() - started
        shares = [m.ratio * speedup for m in result.measurements]
        ours = {"builds": result.report.builds, "met": result.met, "seconds": seconds}
        rows.append({"part": "c", "point": f"{spec} {speedup:g}x", "method": "ours", **ours})
        rows[-1] |= {"share": result.measurement.ratio * speedup, "shares": shares}
        print(shown(rows[-1]), flush=True)
        for step in (None, measure.native_channel_multiple()):
            name = "tp uniform" + (" round_to" if step else "")
            row = peer_budget(bench, (module, inputs), speedup, step)
            rows.append({"part": "c", "point": f"{spec} {speedup:g}x", "method": name, **row})
            print(shown(rows[-1]), flush=True)
            bench.save(rows)
    return rows


def peer_budget(bench: Bench, model: tuple[nn.Module, Any], speedup: float, step: Any) -> Row:
    """Bisection with Torch-Pruning until the interval is within the budget and fills it."""
    module, inputs = model
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=bench.folder) as folder:
        yard = Yard(module, inputs, target.load("ort"), Path(folder))
        low, high, shares, met = 0.0, WIDEST, [], False
        while len(shares) < PEER_BUILDS and not met:
            ratio = (low + high) / 2
            pruned = torch_pruning(
                copy.deepcopy(module), inputs[0], ratio, "l2", {"round_to": step}
            )
            seen = yard.compare(pruned)
            shares.append(seen.ratio * speedup)
            met = seen.high * speedup <= 1 and shares[-1] >= 0.97
            low, high = (low, ratio) if seen.high * speedup <= 1 else (ratio, high)
    built = len(yard.measured)
    found = {"builds": len(shares), "distinct": built, "met": met, "shares": shares}
    best = max((share for share in shares if share <= 1), default=None)
    return found | {"seconds": time.monotonic() - started, "share": shares[-1] if met else best}


def part_d(bench: Bench) -> list[Row]:
    """Predicted against measured latency, without feedback."""
    torch.manual_seed(0)
    subjects: list[tuple[str, nn.Module, Any]] = [("DigitNet", DigitNet().eval(), EXAMPLE)]
    for spec in () if bench.quick else ("resnet18", "mobilenet_v2"):
        loaded = models.load(spec, weights=None, input_size=(SIDE, SIDE), batch=1, seed=0)
        subjects.append((spec, loaded.module, loaded.example_inputs))
    rows: list[Row] = []
    for name, module, inputs in subjects:
        yard = Yard(module, inputs, bench.profile, bench.folder / name)
        yard.probe(PROBES)
        scores = score("l2", module, yard.graph)
        among = choices(yard.graph, importance_curves(yard.graph, scores), multiple=yard.multiple)
        for probes in (3, PROBES):
            model = fit(yard.graph, yard.builds[: probes + 1], multiple=yard.multiple)
            for speedup in SPEEDUPS:
                plan = allocate(Problem(yard.graph, model, among, yard.base_ms / speedup))
                seen = yard.compare(yard.pruned(plan.counts))
                predicted = plan.predicted_ms / yard.base_ms
                macs = yard.graph.macs(plan.counts) / yard.graph.macs()
                row = {"predicted": predicted, "measured": seen.ratio, "macs": macs}
                row["half_width"] = 100 * ((seen.high / seen.low) ** 0.5 - 1)
                row["error"] = 100 * (predicted / seen.ratio - 1)
                rows.append({"part": "d", "method": f"{probes} probes", "point": name, **row})
                rows[-1]["speedup"] = speedup
                print(shown(rows[-1]), flush=True)
                bench.save(rows)
    return rows


PARTS: Mapping[str, tuple[Callable[[Bench], list[Row]], Callable[[list[Row]], list[str]]]] = {
    "a": (part_a, table_equal),
    "b": (part_b, table_planted),
    "c": (part_c, table_plain),
    "d": (part_d, table_plain),
}


def facts() -> Row:
    """The machine, the libraries and how busy the host is."""
    names = ("torch", "torch-pruning", "onnxruntime", "onnx", "onnxsim")
    return {
        "host": measure.fingerprint(),
        "versions": {name: version(name) for name in names},
        "load": os.getloadavg(),
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "multiple": measure.native_channel_multiple(),
    }


def main() -> None:
    """Run the parts that are asked for, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--part", choices=[*PARTS, "all"], default="all")
    parser.add_argument("--seeds", type=int, default=4, help="how many networks")
    parser.add_argument("--first", type=int, default=0, help="seed of the first of them")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "--latencies",
        action="store_true",
        help="part a: measure only; with --work, runs that train can then go side by side",
    )
    parser.add_argument("--out", type=Path, default=Path("bench_budget.json"))
    parser.add_argument("--work", type=Path, help="networks and measured latencies are kept here")
    args = parser.parse_args()
    if args.latencies and args.part != "a":
        parser.error("--latencies goes with --part a")
    torch.set_num_threads(1)
    result: Row = {"quick": args.quick, "seeds": args.seeds, "start": facts()}
    for name in PARTS if args.part == "all" else [args.part]:
        started = time.monotonic()

        def save(rows: list[Row], name: str = name) -> None:
            result[name] = rows
            args.out.write_text(json.dumps(result, indent=1, default=str))

        with contextlib.ExitStack() as stack:
            folder = args.work or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            folder.mkdir(parents=True, exist_ok=True)
            seeds = tuple(range(args.first, args.first + (1 if args.quick else args.seeds)))
            rows = PARTS[name][0](Bench(seeds, args.quick, args.latencies, folder.resolve(), save))
        if args.latencies:
            break
        print(f"\npart {name}, {time.monotonic() - started:.0f} s", *PARTS[name][1](rows), sep="\n")
        result["end"] = facts()
        save(rows)


if __name__ == "__main__":
    main()
