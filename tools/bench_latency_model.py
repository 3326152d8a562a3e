"""How well the latency model predicts plans it has not seen.

Protocol, fixed before any figure was taken. For each model: build and profile the unpruned model,
PROBES random aligned probes and HELD further random aligned plans on the target. Fit on the
unpruned model and the first k probes, for k = 3 and 6. Predict every held-out plan and compare

- the sum of its operators with the sum of its profile (each the least of RUNS runs), and
- its whole latency, with the model anchored at the unpruned model alone, and at the probes too,
  with the median wall time of the same engine, timed in turn with the unpruned one.

The error of counting multiply-accumulates (latency in proportion) is given beside it. Medians of
absolute relative errors.

    python tools/bench_latency_model.py resnet18 mobilenet_v2 yolov8n.yaml --out figures.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from prune2deploy import models, target
from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine, Session
from prune2deploy.exporting import export, simplify
from prune2deploy.graph import trace
from prune2deploy.measure import fingerprint, native_channel_multiple
from prune2deploy.plan.latency_model import Build, fit
from prune2deploy.plan.plan import Plan
from prune2deploy.plan.probes import probes
from prune2deploy.surgery.slicing import apply
from prune2deploy.timing import OperatorTiming

PROBES, HELD, RUNS, ROUNDS = 6, 8, 30, 40


@dataclass
class Taken:
    """One build with its profile and its median wall time in baseline milliseconds."""

    counts: dict[str, int]
    profile: tuple[OperatorTiming, ...]
    wall_ms: float


class Bench:
    """Builds plans of one model on one target."""

    def __init__(
        self, spec: str, target_name: str, size: tuple[int, int] | None, folder: Path
    ) -> None:
        self.loaded = models.load(spec, weights=None, input_size=size, batch=1, seed=0)
        self.target = target.load(target_name)
        self.backend = registry.for_target(self.target)
        self.graph = trace(self.loaded.module, self.loaded.example_inputs)
        self.multiple = self.target.channel_multiple or native_channel_multiple()
        self.folder = folder
        self.base = self._engine({}, "base")
        self.base_ms = 0.0

    def _engine(self, counts: dict[str, int], name: str) -> Engine:
        plan = Plan({a: tuple(range(c)) for a, c in counts.items() if c < self.graph[a].size})
        module, inputs = self.loaded.module, self.loaded.example_inputs
        if plan.kept:
            module = apply(module, self.graph, plan, inputs)
        exported = export.to_onnx(module, inputs, self.folder / name / "exported.onnx")
        report = simplify.simplify(exported, self.folder / name / "model.onnx")
        return self.backend.build(report.path, self.target, self.folder / name)

    def take(self, counts: dict[str, int], name: str) -> Taken:
        """Build, profile, and time in turn with the unpruned engine."""
        engine = self._engine(counts, name) if counts else self.base
        with self.backend.open(engine, self.target) as one:
            feeds = self._feeds(one)
            profile = self.backend.profile(engine, self.target, feeds, RUNS)
            with self.backend.open(self.base, self.target) as other:
                one.prepare(feeds)
                other.prepare(feeds)
                pairs = [(one.time_once(), other.time_once()) for _ in range(ROUNDS)][4:]
        ratio = statistics.median(
            (a.cpu_ns or a.wall_ns) / (b.cpu_ns or b.wall_ns) for a, b in pairs
        )
        if not counts:
            self.base_ms = statistics.median(b.wall_ns / 1e6 for _, b in pairs)
        return Taken(counts, profile, ratio * self.base_ms)

    def _feeds(self, session: Session) -> dict[str, npt.NDArray[np.generic]]:
        rng = np.random.default_rng(0)
        return {
            spec.name: rng.standard_normal(spec.shape).astype(spec.dtype) for spec in session.inputs
        }


def errors(bench: Bench, taken: list[Taken], k: int) -> dict[str, float]:
    """Held-out errors of a model fitted on the first ``k`` probes, in per cent."""
    known, held = taken[: k + 1], taken[PROBES + 1 :]
    found: dict[str, float] = {}
    for anchors in (1, k + 1):
        builds = [
            Build(t.counts, t.profile, t.wall_ms if i < anchors else None)
            for i, t in enumerate(known)
        ]
        model = fit(bench.graph, builds, multiple=bench.multiple)
        sums = [sum(o.ns for o in t.profile) / 1e6 for t in held]
        found["operators"] = _median(
            [model.operators_ms(t.counts) / s - 1 for t, s in zip(held, sums, strict=True)]
        )
        key = "whole, baseline measured" if anchors == 1 else "whole, probes measured"
        found[key] = _median([model.predict(t.counts) / t.wall_ms - 1 for t in held])
        found["unmatched"] = len(model.unmatched)
    base = known[0].wall_ms / bench.graph.macs()
    found["by MACs"] = _median([bench.graph.macs(t.counts) * base / t.wall_ms - 1 for t in held])
    return found


def _median(values: list[float]) -> float:
    return round(100 * statistics.median(abs(v) for v in values), 2)


def run(spec: str, target_name: str, size: tuple[int, int] | None) -> dict[str, object]:
    """Take all builds of one model and give its errors."""
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(spec, target_name, size, Path(folder))
        plans = [
            {},
            *probes(bench.graph, PROBES, multiple=bench.multiple, seed=0),
            *probes(bench.graph, HELD, multiple=bench.multiple, seed=1),
        ]
        started = time.monotonic()
        taken = []
        for number, plan in enumerate(plans):
            taken.append(bench.take(plan, str(number)))
            print(f"{spec}: build {number}: {taken[-1].wall_ms:.3f} ms", flush=True)
        found = {str(k): errors(bench, taken, k) for k in (3, 6)}
        return {"model": spec, "seconds": round(time.monotonic() - started), "errors": found}


def main() -> None:
    """Run the models named on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--target", default="ort")
    parser.add_argument("--input-size", type=int, default=None)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    torch.set_num_threads(1)
    size = (args.input_size, args.input_size) if args.input_size else None
    rows = [run(spec, args.target, size) for spec in args.models]
    for row in rows:
        print(json.dumps(row, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps({"rows": rows, "host": str(fingerprint())}, indent=1))


if __name__ == "__main__":
    main()
