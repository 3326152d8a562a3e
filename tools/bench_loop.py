"""How many builds it takes to meet a budget, over models and speed-ups, by the command line alone.

Every case is a process of its own, `prune2deploy run --json`, with random weights, target `ort`,
no data and nothing cached. The window asked for: the upper end of the measured 95 % interval of the
ratio between 97 and 100 % of the budget. A case is good where it ends in the window, or with exit
code 4 (no plan is fast enough: the floor is measured). Then each model gets a second budget that
may use what the first run of it left in the cache.

    python tools/bench_loop.py --out loop.json [--models resnet18 ...] [--speedups 1.3 2]

Cases that `--out` holds already are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SIDES = {"yolov8n.yaml": 320}
MODELS = ("resnet18", "resnet50", "mobilenet_v2", "densenet121", "yolov8n.yaml", "vit_b_32")
SPEEDUPS = (1.3, 1.6, 2.0, 3.0)
FIRST, SECOND = 2.0, 1.6  # budgets of the cached pair
FILL = 0.97
Row = dict[str, Any]


def main() -> None:
    """Run the cases that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--out", type=Path, default=Path("bench_loop.json"))
    parser.add_argument("--work", type=Path, default=Path("bench_loop_runs"))
    parser.add_argument("--models", nargs="*", default=MODELS)
    parser.add_argument("--speedups", nargs="*", type=float, default=SPEEDUPS)
    options = parser.parse_args()
    rows: list[Row] = json.loads(options.out.read_text()) if options.out.exists() else []
    done = {(row["model"], row["speedup"], row["cached"]) for row in rows}
    cases = [(m, s, False) for m in options.models for s in options.speedups]
    for model, speedup, cached in [*cases, *((m, SECOND, True) for m in options.models)]:
        if (model, speedup, cached) in done:
            continue
        rows.append(case(options.work, model, speedup, cached=cached))
        print(text(rows[-1]), flush=True)
        options.out.write_text(json.dumps(rows, indent=1))
    print("\n".join(["", *map(text, rows), "", *totals(rows)]))


def case(work: Path, model: str, speedup: float, *, cached: bool) -> Row:
    """One run; a cached one starts from what the run for ``FIRST`` left."""
    name = f"{model}-{speedup:g}{'-cached' if cached else ''}"
    side = SIDES.get(model, 224)
    place = work / f"cache-{model}-{FIRST if cached else speedup:g}"
    command = [sys.executable, "-m", "prune2deploy", "run", "--model", model, "--target", "ort"]
    command += ["--speedup", f"{speedup:g}", "--input-size", f"{side}x{side}"]
    command += ["--out", str(work / name), "--json"]
    begun = time.time()
    environment = os.environ | {"PRUNE2DEPLOY_CACHE": str(place.resolve())}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    row: Row = {"model": model, "speedup": speedup, "cached": cached, "exit": ended.returncode}
    row |= {"seconds": time.time() - begun, "load": os.getloadavg()}
    manifest = work / name / "manifest.json"
    if not manifest.exists():
        return row | {"error": ended.stderr[-2000:]}
    tries = len(list((work / name / "raw").glob("*-correction.npz")))
    return row | facts(json.loads(manifest.read_text())) | {"corrections": tries}


def facts(run: Row) -> Row:
    """What the table needs of a manifest."""
    high, p50, budget = run["bound_ms"], run["final"]["p50_ms"], run["budget_ms"]
    return {
        "verdict": run["verdict"],
        "builds": run["builds"],
        "share": p50 / budget,
        "high": high / budget,
        "measured_speedup": run["speedup"],
        "host": run["host"],
    }


def good(row: Row) -> bool:
    """In the window, or out of reach with a measured floor."""
    if row["exit"] == 0:
        return bool(FILL <= row["high"] <= 1)
    return bool(row["exit"] == 4)


def text(row: Row) -> str:
    """One case in one line."""
    head = f"{row['model']:14} {row['speedup']:4g}x {'cached' if row['cached'] else '':7}"
    if "error" in row:
        return f"{head} exit {row['exit']}: {row['error'].strip().splitlines()[-1:]}"
    return (
        f"{head} exit {row['exit']} {row['verdict']:11} p50 {100 * row['share']:6.1f} %  upper end "
        f"{100 * row['high']:6.1f} %  builds {row['builds']:2d} (corrections {row['corrections']})"
        f"  {row['seconds']:4.0f} s  {'' if good(row) else 'OUTSIDE'}"
    )


def totals(rows: list[Row]) -> list[str]:
    """Medians over the cases, cold and cached apart."""
    lines = []
    for cached in (False, True):
        mine = [row for row in rows if row["cached"] == cached]
        ran = [row for row in mine if "builds" in row]
        if ran:
            builds = [row["builds"] for row in ran]
            lines.append(
                f"{'second budget, cached' if cached else 'nothing cached'}: "
                f"{sum(map(good, mine))} of {len(mine)} in the window or truly out of reach; "
                f"builds median {statistics.median(builds):g}, most {max(builds)}; "
                f"corrections median {statistics.median(r['corrections'] for r in ran):g}"
            )
    return lines


if __name__ == "__main__":
    main()
