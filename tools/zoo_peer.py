"""Torch-Pruning on one model of the zoo, called as any model is, with no help for this one."""

from __future__ import annotations

import copy
import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from prune2deploy.graph.calling import tensors_in


class PeerTimeout(BaseException):
    """The peer took longer than it may."""


def run_peer(model: nn.Module, example: Any, seconds: int) -> dict[str, Any]:
    """Torch-Pruning, 50 % uniform, no help for the model; the same shape and drop checks."""

    def stop(*_: Any) -> None:
        raise PeerTimeout

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    begun = time.perf_counter()
    try:
        text = _peer_run(copy.deepcopy(model).eval(), example)
    except PeerTimeout:
        text = f"more than {seconds} s"
    except Exception as error:  # noqa: BLE001  how it fails is a result
        text = f"{type(error).__name__}: {error}"[:120]
    finally:
        signal.alarm(0)
    return {"ok": text == "ok", "text": text, "seconds": time.perf_counter() - begun}


def _peer_run(model: nn.Module, example: Any) -> str:
    import torch_pruning as tp

    before = sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        shapes = _shapes(model, example)
    final = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)][-1:]
    pruner = tp.pruner.MagnitudePruner(
        model, dict(example) if isinstance(example, Mapping) else example,
        importance=tp.importance.MagnitudeImportance(p=2), pruning_ratio=0.5,
        ignored_layers=[m for m in final if isinstance(m, nn.Linear)],
    )  # fmt: skip
    pruner.step()
    with torch.no_grad():
        found = _shapes(model.eval(), example)
    if found != shapes:
        return f"output shapes {found[:3]}, expected {shapes[:3]}"[:120]
    after = sum(p.numel() for p in model.parameters())
    return "ok" if after < before else "nothing pruned"


def _shapes(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    made = model(**example) if isinstance(example, Mapping) else model(*example)
    return [tuple(t.shape) for t in tensors_in(made)]
