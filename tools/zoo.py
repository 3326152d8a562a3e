"""Run the zoo: hundreds of models through the dependency graph, with one call and no help.

For every model, in a child process with limits on time and memory: trace; remove half of every
prunable axis; run the result in evaluation and in training mode with gradients on a batch of two;
compare output shapes and parameter counts; capture the untouched model and compare its outputs;
export to ONNX and compare ONNX Runtime's outputs. ``--peer`` runs Torch-Pruning on the same model,
called with no help for any model either.

    python tools/zoo.py                             everything, writes docs/zoo.md
    python tools/zoo.py --only 'timm/*' --stage prune --json out.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import select
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = ("trace", "prune", "export")
CHECKS = {
    "trace": ("trace",),
    "prune": ("trace", "prune", "eval", "train", "params", "nothing"),
    "export": ("trace", "prune", "eval", "train", "params", "nothing", "onnx", "parity"),
}
"""What each stage checks of a model, in order."""
WORKER = Path(__file__).resolve().parent / "zoo_worker.py"
BATCH = 12  # models per child process: imports cost more than most models
MARKS = {True: "ok", False: "FAIL", None: "-"}
Result = dict[str, Any]


def main() -> None:
    """Run the zoo as the command line says."""
    options = _options()
    from zoo_models import names

    wanted = [n for pattern in options.only for n in names(pattern)]
    wanted = list(dict.fromkeys(wanted))
    begun = time.time()
    earlier = [r for path in options.read for r in json.loads(path.read_text())]
    known = {r["name"]: r for r in earlier}
    wanted = [name for name in wanted if name not in known]
    results = list(known.values())
    for number, result in enumerate(run(wanted, options), 1):
        results.append(result)
        print(f"[{number}/{len(wanted)}] {line(result)}", flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1))
    print(summary(results, options.stage))
    if options.page:
        options.page.write_text(page(results, options, time.time() - begun))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", action="append", help="shell pattern of names, may be repeated")
    parser.add_argument("--stage", choices=STAGES, default="export")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--read", type=Path, action="append", default=[],
                        help="results of earlier runs; those models are not run again")  # fmt: skip
    parser.add_argument("--page", type=Path, help="write the Markdown page there")
    parser.add_argument("--peer", action="store_true", help="Torch-Pruning on the same models")
    parser.add_argument("--peer-seconds", type=int, default=60)
    parser.add_argument("--seconds", type=int, default=300, help="time limit for each model")
    parser.add_argument("--gigabytes", type=float, default=14, help="memory limit for each child")
    options = parser.parse_args()
    everything = options.only is None
    options.only = options.only or ["*"]
    if everything and options.stage == "export" and options.page is None:
        options.page = ROOT / "docs" / "zoo.md"
    return options


# ---- child processes


def run(wanted: list[str], options: argparse.Namespace) -> Iterator[Result]:
    """Yield one result per model; a child that dies or hangs costs its current model only."""
    waiting = list(wanted)
    while waiting:
        batch, waiting = waiting[:BATCH], waiting[BATCH:]
        done = yield from _child(batch, options)
        waiting = [name for name in batch if name not in done] + waiting


def _child(batch: list[str], options: argparse.Namespace) -> Iterator[Result]:
    """Run one batch; returns the names that have a result."""
    task = {"names": batch, "stage": options.stage, "gigabytes": options.gigabytes,
            "peer": options.peer, "peer_seconds": options.peer_seconds}  # fmt: skip
    environment = dict(
        os.environ, OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT), PYTHONWARNINGS="ignore"
    )
    child = subprocess.Popen(
        [sys.executable, str(WORKER), json.dumps(task)], env=environment, bufsize=0,
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    done: list[str] = []
    limit = options.seconds + (options.peer_seconds + 30 if options.peer else 0)
    try:
        for name in batch:
            text = _read_line(child, limit)
            if not text:
                child.kill()
                died = child.wait() not in (-9, 0)
                why = "the process died" if died else f"no result within {limit} s"
                yield {"name": name, "error": f"crash: {why}", "checks": {"trace": False}}
                return [*done, name]
            done.append(name)
            yield json.loads(text)
    finally:
        child.kill()
        child.wait()
    return done


def _read_line(child: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the child, or nothing when it dies or takes too long."""
    assert child.stdout is not None
    ready, _, _ = select.select([child.stdout], [], [], seconds)
    return child.stdout.readline() if ready else b""


# ---- text


def passed(result: Result, stage: str = "export") -> bool:
    """Whether a model passed every check that applies to it."""
    checks = result["checks"]
    return all(checks.get(name, False) is not False for name in CHECKS[stage])


def line(result: Result) -> str:
    """One model in one line."""
    checks = " ".join(f"{k}:{MARKS[v]}" for k, v in result["checks"].items())
    facts = ""
    if "share" in result:
        facts = f"share {result['share']:.3f} ops {result['operators']} "
        facts += f"trace {result['seconds_trace']:.2f} s"
        facts += " captured" if result.get("captured") else ""
    unknown = f" unknown {result['unknown']}" if result.get("unknown") else ""
    error = f" | {result['error'][:300]}" if result.get("error") else ""
    return f"{result['name']:44s} {checks} {facts}{unknown}{error}"


def summary(results: list[Result], stage: str) -> str:
    """The counts over all models."""
    good = [r for r in results if passed(r, stage)]
    shares = [r["share"] for r in results if "share" in r]
    lines = [f"{len(good)} of {len(results)} models pass everything ({_percent(good, results)})"]
    lines.append(f"crashes: {sum(r.get('error', '').startswith('crash') for r in results)}")
    if shares:
        lines.append(
            f"median share of parameters in prunable axes: {statistics.median(shares):.3f}"
        )
    if any("peer" in r for r in results):
        peers = [r for r in results if r.get("peer", {}).get("ok")]
        lines.append(f"Torch-Pruning, no help: {len(peers)} of {len(results)}")
    return "\n".join(lines)


def _percent(part: list[Result], whole: list[Result]) -> str:
    return f"{100 * len(part) / max(len(whole), 1):.1f} %"


def page(results: list[Result], options: argparse.Namespace, seconds: float) -> str:
    """The Markdown page: how it was run, the counts, the failures, one table per library."""
    out = ["# The zoo", "", _how(options, seconds), "", "## Result", ""]
    out += [f"- {entry}" for entry in summary(results, options.stage).splitlines()]
    out += ["", "| library | models | all pass | captured | median share | median trace, s |",
            "|---|---|---|---|---|---|"]  # fmt: skip
    libraries = list(dict.fromkeys(r["name"].split("/")[0] for r in results))
    for library in libraries:
        own = [r for r in results if r["name"].startswith(library + "/")]
        traced = [r for r in own if "share" in r]
        median = {
            k: statistics.median([r[k] for r in traced] or [0]) for k in ("share", "seconds_trace")
        }
        good = sum(passed(r, options.stage) for r in own)
        captured = sum(bool(r.get("captured")) for r in own)
        out.append(f"| {library} | {len(own)} | {good} | {captured} | {median['share']:.3f} | "
                   f"{median['seconds_trace']:.2f} |")  # fmt: skip
    out += ["", "## What does not pass", ""]
    failing = [r for r in results if not passed(r, options.stage)]
    out += [f"- `{r['name']}`: {_cell(r.get('error') or line(r))}" for r in failing] or ["Nothing."]
    out += ["", "## Checks that do not apply", "", *_not_applicable(results)]
    out += ["", "## Why axes are frozen, over all models", "", *_reasons(results)]
    for library in libraries:
        out += [
            "",
            f"## {library}",
            "",
            *_table([r for r in results if r["name"].startswith(library + "/")]),
        ]
    return "\n".join(out) + "\n"


HOW = """\
Written by `tools/zoo.py`. Every model has random weights and goes through the same calls:
`trace(model, example)`, half of every prunable axis removed (the first channels stay),
`apply(model, graph, plan)`. No model gets an option, a patched forward or a list of layers to
leave alone.

`eval`: the pruned model runs, gives gradients, and its output shapes are those of the original.
`train`: it runs in training mode on a batch of two and gives gradients. Shapes are compared less
strictly there: a model that returns inner feature maps in training mode alone returns as many,
of the same batch size, but narrower ones (all YOLO heads do); a captured model returns what the
original returns in evaluation mode, and is not compared. `params`: as many parameters as the
graph's formulas say, fewer than before. `nothing`: the captured form of the untouched model
computes what the model computes (1e-3 relative). `onnx`, `parity`: TorchScript export, and ONNX
Runtime within 1e-3 of the largest output; where a model ranks what it returns (top-k, sort,
non-maximum suppression), rounding decides between near ties, and rows that come in another order
are compared with the row most like them. A dash marks a check that the *original* model does not
pass either, or that does not apply. `share`: parameters that a prunable axis cuts, over all
parameters of rank two and more. `captured`: the model's own code holds widths as constants, so that
the pruned model is a captured graph.
"""


def _how(options: argparse.Namespace, seconds: float) -> str:
    packages = (
        "torch", "torchvision", "timm", "ultralytics", "transformers", "diffusers", "onnxruntime",
        "torch-pruning",
    )  # fmt: skip
    found = ", ".join(f"{name} {version(name)}" for name in packages)
    return (
        f"{HOW}\nInput sizes are small (see `tools/zoo_models.py`). {platform.machine()}, one "
        f"thread, {seconds / 60:.0f} min, limits of {options.seconds} s and "
        f"{options.gigabytes:g} GB a model. {found}."
    )


def _not_applicable(results: list[Result]) -> list[str]:
    rows = [
        f"- `{r['name']}`: {', '.join(k for k, v in r['checks'].items() if v is None)}"
        f" ({_cell(r.get('note', ''))})"
        for r in results
        if None in r["checks"].values()
    ]
    return rows or ["None."]


def _reasons(results: list[Result]) -> list[str]:
    models: Counter[str] = Counter()
    axes: Counter[str] = Counter()
    for result in results:
        for reason, count in result.get("frozen", {}).items():
            models[reason] += 1
            axes[reason] += count
    return ["| reason | axes | models |", "|---|---|---|"] + [
        f"| {_cell(reason)} | {axes[reason]} | {models[reason]} |"
        for reason, _ in models.most_common()
    ]


def _table(results: list[Result]) -> list[str]:
    peer = any("peer" in r for r in results)
    head = [
        "model",
        *CHECKS["export"],
        "captured",
        "axes",
        "share",
        "params",
        "trace, s",
        "frozen because",
    ]
    head += ["Torch-Pruning"] if peer else []
    rows = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for r in results:
        cells = [
            r["name"].partition("/")[2],
            *(MARKS[r["checks"].get(c, False)] for c in CHECKS["export"]),
        ]
        if "share" in r:
            frozen = "; ".join(f"{n} x {reason}" for reason, n in r["frozen"].items())
            dropped = f"{r['params_before'] / 1e6:.2f} → {r.get('params_after', 0) / 1e6:.2f} M"
            cells += ["yes" if r.get("captured") else "", f"{r['prunable']} of {r['axes']}",
                      f"{r['share']:.3f}", dropped, f"{r['seconds_trace']:.2f}",
                      _cell(frozen)]  # fmt: skip
        else:
            cells += [""] * 6
        if peer:
            cells.append(_cell(r.get("peer", {}).get("text", "")))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "/").split())[:260]


if __name__ == "__main__":
    main()
