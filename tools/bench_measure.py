"""Does the reported ratio of two fixed models stand a loaded host?

Protocol, fixed beforehand. Two convolutional networks (the same but for their width) are built for
one thread of ONNX Runtime. Then, first on the host as it is and again while one process per core
spins,

- ours: ``measure.compare`` of the two, with its ordinary settings;
- plain: the mean wall time of 100 runs of one after 10 to warm up, then of the other, as most
  scripts do; the ratio of the two means.

Each is repeated ``--repeats`` times. The truth is the median of our quiet ratios. Printed are every
ratio and its error against the truth. Ours is wanted within 2 per cent on the loaded host.

Run: ``python tools/bench_measure.py [--repeats 5] [--json FILE]``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import numpy as np

from prune2deploy import measure, target
from prune2deploy.backends import registry
from prune2deploy.backends.base import Engine
from prune2deploy.backends.feeds import random_feeds
from prune2deploy.target import Target

WIDTHS = (48, 64)
DEPTH = 8


def write_network(path: Path, width: int) -> Path:
    """Write ``DEPTH`` 3x3 convolutions of ``width`` channels on 1x3x56x56 as ONNX."""
    from onnx import TensorProto, helper, numpy_helper, save

    random = np.random.default_rng(0)
    nodes, weights, last, channels = [], [], "x", 3
    for layer in range(DEPTH):
        scale = (2 / (9 * channels)) ** 0.5
        values = (scale * random.standard_normal((width, channels, 3, 3))).astype(np.float32)
        weights.append(numpy_helper.from_array(values, f"w{layer}"))
        nodes.append(helper.make_node("Conv", [last, f"w{layer}"], [f"c{layer}"], pads=[1] * 4))
        nodes.append(helper.make_node("Relu", [f"c{layer}"], [f"r{layer}"]))
        last, channels = f"r{layer}", width
    tensor = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes,
        "net",
        [tensor("x", TensorProto.FLOAT, [1, 3, 56, 56])],
        [tensor(last, TensorProto.FLOAT, [1, width, 56, 56])],
        weights,
    )
    opsets = [helper.make_opsetid("", 17)]
    save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    return path


@contextmanager
def spinning(count: int) -> Iterator[None]:
    """Keep ``count`` processes busy meanwhile."""
    code = "while True: pass"
    processes = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(count)]
    try:
        time.sleep(1.0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def plain_ratio(engines: tuple[Engine, Engine], profile: Target) -> float:
    """Ratio of the mean wall times of 100 runs each, one engine after the other."""
    means = []
    for engine in engines:
        with registry.for_target(profile).open(engine, profile) as session:
            session.prepare(random_feeds(session.inputs, seed=0))
            times = [session.time_once().wall_ns for _ in range(110)][10:]
        means.append(sum(times) / len(times))
    return means[0] / means[1]


def ratios(engines: tuple[Engine, Engine], profile: Target, repeats: int) -> dict[str, list[float]]:
    """Take both kinds of ratio ``repeats`` times."""
    found: dict[str, list[float]] = {"ours": [], "plain": []}
    for repeat in range(repeats):
        ours = measure.compare(*engines, profile)
        found["ours"].append(ours.ratio)
        found["plain"].append(plain_ratio(engines, profile))
        print(
            f"  {repeat + 1}: ours {ours.ratio:.4f} ({ours.ratio_ci95[0]:.4f} to "
            f"{ours.ratio_ci95[1]:.4f}, clock {ours.clock}, {', '.join(ours.flags) or 'no flags'})"
            f"; plain {found['plain'][-1]:.4f}",
            flush=True,
        )
    return found


def main() -> int:
    """Run the protocol and print its table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    profile = target.load("ort")
    backend = registry.for_target(profile)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        paths = [write_network(Path(folder) / f"w{w}.onnx", w) for w in WIDTHS]
        engines = tuple(backend.build(p, profile, Path(folder) / "engines") for p in paths)
        pair = (engines[0], engines[1])
        print(f"quiet (load average {os.getloadavg()[0]:.1f} on {cores} cores)")
        quiet = ratios(pair, profile, args.repeats)
        print(f"loaded ({cores} spinning processes)")
        with spinning(cores):
            loaded = ratios(pair, profile, args.repeats)
    truth = median(quiet["ours"])
    print(f"\ntruth {truth:.4f}; worst and median error in per cent")
    for kind in ("ours", "plain"):
        for name, taken in (("quiet", quiet), ("loaded", loaded)):
            errors = [100 * abs(r / truth - 1) for r in taken[kind]]
            print(f"  {kind:6} {name:7} worst {max(errors):6.2f}  median {median(errors):6.2f}")
    if args.json:
        result = {"quiet": quiet, "loaded": loaded, "truth": truth, "host": measure.fingerprint()}
        args.json.write_text(json.dumps(result, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
