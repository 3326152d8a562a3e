"""Time trace + plan + prune against Torch-Pruning's build + step, interleaved in one run.

Both remove half of every width that they may. Each round runs both on a fresh copy of the model,
in turn, after garbage is collected; the smallest time of each counts, in thread CPU time, which
other load on the machine disturbs least. A round of the peer that takes longer than the limit is
stopped and its time is written as a lower bound. Also printed: the trace over one forward pass,
and per operator.

    python tools/bench_graph.py [--rounds 3] [--peer-seconds 60] [--json OUT] [MODEL ...]
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import os
import signal
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import nn

from prune2deploy.graph import trace
from prune2deploy.models import load
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.slicing import apply

MODELS = (
    "resnet50", "densenet121", "efficientnet_b0", "vit_b_16", "swin_t", "convnext_tiny",
    "yolov8n.yaml", "yolo11n.yaml",
)  # fmt: skip
SIDE = 224
Row = dict[str, Any]


class PeerTimeout(BaseException):
    """The peer took longer than it may."""


def main() -> None:
    """Run the benchmark as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer-seconds", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    _warm_up()
    rows = []
    for name in options.models:
        rows.append(bench(name, options.rounds, options.peer_seconds))
        print(text(rows[-1]), flush=True)
    ratios = [row["ratio"] for row in rows]
    print(f"median ratio {statistics.median(ratios):.1f}, smallest {min(ratios):.1f}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


def _warm_up() -> None:
    """Have torch import what it imports on first use."""
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(1, 4)
    _ours(model, (x,))
    _peer(copy.deepcopy(model), (x,), "warm-up", 60)


def bench(name: str, rounds: int, peer_seconds: int) -> Row:
    """Time one model."""
    loaded = load(name, input_size=(SIDE, SIDE))
    model, inputs = loaded.module, loaded.example_inputs
    ours: list[dict[str, float]] = []
    peer: list[float] = []
    outcome = ""
    for _ in range(rounds):
        ours.append(_ours(_fresh(model), inputs))
        if not outcome.startswith("more than"):
            seconds, outcome = _peer(_fresh(model), inputs, name, peer_seconds)
            peer.append(seconds)
    best = {key: min(row[key] for row in ours) for key in ours[0]}
    total = min(row["trace"] + row["plan"] + row["prune"] for row in ours)
    return {
        "model": name,
        **best,
        "total": total,
        "peer": min(peer),
        "outcome": outcome,
        "ratio": min(peer) / total,
    }


def _fresh(model: nn.Module) -> nn.Module:
    """A copy; what earlier rounds have left is collected now, and not while one is timed."""
    copied = copy.deepcopy(model)
    gc.collect()
    return copied


def _ours(model: nn.Module, inputs: tuple[Any, ...]) -> dict[str, float]:
    clock = time.thread_time
    with torch.no_grad():
        model(*inputs)
        begun = clock()
        model(*inputs)
        forward = clock() - begun
    begun = clock()
    graph = trace(model, inputs)
    traced = clock()
    plan = Plan({axis.name: tuple(range(axis.size // 2)) for axis in graph.prunable})
    planned = clock()
    pruned = apply(model, graph, plan)
    done = clock()
    assert sum(p.numel() for p in pruned.parameters()) == graph.params(plan.counts)
    return {
        "forward": forward,
        "trace": traced - begun,
        "plan": planned - traced,
        "prune": done - planned,
        "operators": len(graph.operators),
    }


def _peer(model: nn.Module, inputs: tuple[Any, ...], name: str, seconds: int) -> tuple[float, str]:
    """Torch-Pruning, uniform half; the last layers are left alone as its own examples do."""
    import torch_pruning as tp

    def stop(*_: Any) -> None:
        raise PeerTimeout

    heads = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    begun = time.thread_time()
    outcome = "ok"
    try:
        pruner = tp.pruner.MagnitudePruner(
            model, inputs if len(inputs) > 1 else inputs[0], pruning_ratio=0.5,
            importance=tp.importance.MagnitudeImportance(p=2), ignored_layers=heads,
        )  # fmt: skip
        pruner.step()
    except PeerTimeout:
        return float(seconds), f"more than {seconds} s"
    except Exception as error:  # noqa: BLE001  how it fails is part of the result
        outcome = f"{type(error).__name__}: {error}"[:60]
    finally:
        signal.alarm(0)
    return time.thread_time() - begun, outcome


def text(row: Row) -> str:
    """One model in one line."""
    per_operator = 1e3 * (row["trace"] - row["forward"]) / row["operators"]
    return (
        f"{row['model']:18s} ours {row['total']:7.3f} s (trace {row['trace']:.3f}, plan "
        f"{row['plan']:.3f}, prune {row['prune']:.3f})  peer {row['peer']:8.3f} s {row['outcome']}"
        f"  ratio {row['ratio']:6.1f}  trace/forward {row['trace'] / row['forward']:.2f}, "
        f"{per_operator:.2f} ms an operator beyond it"
    )


if __name__ == "__main__":
    main()
