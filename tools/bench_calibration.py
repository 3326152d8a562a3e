"""Does the memory of int8 calibration stay flat with the number of samples?

    python tools/bench_calibration.py --model resnet18 --input-size 224 --out calibration.json

Every method is run in a process of its own at every number of samples. Printed and written: the
growth of its resident memory above what the model, its runtime and one calibrated sample need, the
largest allocation that Python saw, seconds per sample, and how far the ranges lie from those of
the largest number of samples.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from prune2deploy import models
from prune2deploy.exporting import export, simplify
from prune2deploy.exporting.ranges import METHODS, calibrate


class Drawn:
    """Random batches that are drawn when they are asked for, the same on every pass."""

    def __init__(self, count: int, shape: tuple[int, ...]) -> None:
        self.count, self.shape = count, shape

    def __iter__(self) -> Iterator[tuple[tuple[torch.Tensor, ...], None]]:
        for i in range(self.count):
            generator = torch.Generator().manual_seed(i)
            yield (torch.randn(1, *self.shape, generator=generator),), None


def peak_mb() -> float:
    """Greatest resident memory of this process so far, in MB (``ru_maxrss`` counts its parent)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1e3


def work(path: Path, shape: tuple[int, ...], method: str, count: int) -> dict[str, Any]:
    """Calibrate once; this process is used for nothing else."""
    torch.set_num_threads(1)
    calibrate(path, Drawn(1, shape), method)
    before = peak_mb()
    started = time.perf_counter()
    found = calibrate(path, Drawn(count, shape), method)
    seconds = time.perf_counter() - started
    grown = peak_mb() - before
    tracemalloc.start()
    calibrate(path, Drawn(min(count, 4), shape), method)
    traced = tracemalloc.get_traced_memory()[1] / 1e6
    ends = {name: max(abs(low), abs(high)) for name, (low, high) in found.ranges.items()}
    return {
        "method": method,
        "samples": count,
        "peak_mb": peak_mb(),
        "grown_mb": grown,
        "python_mb": traced,
        "seconds": seconds,
        "ends": ends,
    }


def child(arguments: list[str]) -> dict[str, Any]:
    """Run ``work`` in a fresh process."""
    command = [sys.executable, __file__, "--child", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    return dict(json.loads(done.stdout))


def rows(path: Path, shape: tuple[int, ...], counts: list[int]) -> Iterator[dict[str, Any]]:
    """One result per method and number of samples, with the ranges' median distance."""
    shown = "x".join(map(str, shape))
    for method in METHODS:
        found = [child([str(path), shown, method, str(n)]) for n in counts]
        last = found[-1]["ends"]
        for one in found:
            ends = one.pop("ends")
            off = sorted(abs(ends[n] - last[n]) / max(last[n], 1e-9) for n in last)
            yield {**one, "median_off": off[len(off) // 2]}


def main() -> int:
    """Bench what the command line asks for."""
    if sys.argv[1:2] == ["--child"]:
        path, shape, method, count = sys.argv[2:]
        print(json.dumps(work(Path(path), tuple(map(int, shape.split("x"))), method, int(count))))
        return 0
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    size = (options.input_size, options.input_size)
    loaded = models.load(options.model, weights=None, input_size=size, batch=1, seed=0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = export.to_onnx(loaded.module, loaded.example_inputs, folder / "raw.onnx")
        onnx = simplify.simplify(raw, folder / "model.onnx").path
        shape = tuple(loaded.example_inputs[0].shape[1:])
        found = []
        for row in rows(onnx, shape, options.samples):
            found.append(row)
            print(
                f"{row['method']:<11} {row['samples']:>4} samples: peak {row['peak_mb']:7.1f} MB, "
                f"{row['grown_mb']:+6.1f} MB over one sample, {row['seconds']:6.1f} s, "
                f"ranges {row['median_off']:.2%} off",
                flush=True,
            )
    if options.out:
        options.out.write_text(json.dumps({"model": options.model, "size": size, "rows": found}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
