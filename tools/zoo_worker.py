"""A child process of the zoo: runs the checks on a list of models, one JSON line for each."""

from __future__ import annotations

import copy
import gc
import json
import math
import os
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prune2deploy.errors import Prune2DeployError
from prune2deploy.graph import Graph, trace
from prune2deploy.graph.calling import tensors_in
from prune2deploy.plan.plan import Plan
from prune2deploy.surgery.answers import FollowsInput
from prune2deploy.surgery.capture import capture
from prune2deploy.surgery.slicing import apply

TOLERANCE = 1e-3
Result = dict[str, Any]


def main() -> None:
    """Read the task from the command line, write one JSON line per model."""
    task = json.loads(sys.argv[1])
    limit = int(task["gigabytes"] * 2**30)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    lines = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print does not mix with the results
    for name in task["names"]:
        lines.write(json.dumps(examine(name, task)) + "\n")
        lines.flush()
        gc.collect()


def examine(name: str, task: dict[str, Any]) -> Result:
    """Run every check of the stage on one model."""
    from zoo_models import build
    from zoo_peer import run_peer

    result: Result = {"name": name, "checks": {}}
    try:
        model, example = build(name)
        _own(model, example, task["stage"], result)
        if task["peer"]:
            result["peer"] = run_peer(model, example, task["peer_seconds"])
    except MemoryError:
        result["error"] = "crash: out of memory"
    except Exception as error:  # noqa: BLE001  how it fails is a result
        result["error"] = f"{type(error).__name__}: {error}"[:600]
        if not isinstance(error, Prune2DeployError | AssertionError | CheckFailed):
            result["error"] = "crash: " + result["error"] + _where(error)
    return result


class CheckFailed(Exception):  # noqa: N818  reads as the verdict it is
    """A check that the original model passes and the pruned one does not."""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)[-4:]
    return " at " + " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames)


def _own(model: nn.Module, example: Any, stage: str, result: Result) -> None:
    checks = result["checks"]
    checks["trace"] = False
    begun = time.perf_counter()
    graph = trace(model, example)
    result["seconds_trace"] = time.perf_counter() - begun
    checks["trace"] = True
    result |= facts(graph)
    if stage == "trace":
        return
    checks["prune"] = False
    begun = time.perf_counter()
    pruned = apply(model, graph, half(graph))
    result["seconds_prune"] = time.perf_counter() - begun
    checks["prune"] = True
    result["captured"] = isinstance(pruned, torch.fx.GraphModule)
    result["params_after"] = sum(p.numel() for p in pruned.parameters())
    failures: list[str] = []
    before: list[Tensor] = []  # what the original returns, for the checks that compare with it
    steps: list[tuple[str, Callable[[], bool | None]]] = [
        ("eval", lambda: _eval(model, pruned, example, before)),
        ("train", lambda: _train(model, pruned, example, result)),
        ("params", lambda: _dropped(graph, pruned, result)),
        ("nothing", lambda: _nothing(model, graph, example, before)),
    ]
    if stage == "export":
        steps.append(("onnx", lambda: _export(model, pruned, example, result)))
    result["seconds"] = {}
    for name, step in steps:
        checks[name] = False
        begun = time.perf_counter()
        try:
            checks[name] = step()
        except FollowsInput as refusal:  # the pruned model keeps its own code
            checks[name] = None
            _note(result, f"no captured form: {refusal}")
        except Exception as error:  # noqa: BLE001  how it fails is a result
            failures.append(f"{name}: {type(error).__name__}: {error}{_where(error)}"[:400])
        result["seconds"][name] = round(time.perf_counter() - begun, 2)
    if failures:
        result["error"] = " || ".join(failures)


def half(graph: Graph) -> Plan:
    """The first half of every prunable axis; ties hold since tied axes are equally wide."""
    return Plan({a.name: tuple(range(max(1, a.size // 2))) for a in graph.prunable})


def facts(graph: Graph) -> Result:
    """What the table lists of a graph."""
    cut = {m.tensor for axis in graph.prunable for m in axis.members}
    weights = [name for name in graph.parameters if len(graph.tensors[name]) > 1]
    full = graph.sizes({})
    sizes = {name: math.prod(d(full) for d in graph.tensors[name]) for name in weights}
    total = max(sum(sizes.values()), 1)
    return {
        "share": sum(n for name, n in sizes.items() if name in cut) / total,
        "operators": len(graph.operators),
        "ranks": any(op.func._schema.name in RANKING for op in graph.recording.operations),
        "axes": len(graph.axes),
        "prunable": len(graph.prunable),
        "unknown": dict(graph.unknown),
        "blocks": len(graph.blocks),
        "frozen": dict(Counter(a.frozen for a in graph.axes if a.frozen is not None)),
        "outside": sorted((n for n in weights if n not in cut), key=lambda n: -sizes[n])[:5],
        "params_before": graph.params(),
    }


def _call(model: nn.Module, example: Any) -> list[Tensor]:
    out = model(**example) if isinstance(example, Mapping) else model(*example)
    return list(tensors_in(out))


def _shapes(tensors: list[Tensor]) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for t in tensors]


SEED = 2
"""For models that draw numbers: the passes that are compared draw the same."""


def _eval(model: nn.Module, pruned: nn.Module, example: Any, before: list[Tensor]) -> bool:
    pruned = copy.deepcopy(pruned)  # some keep what they compute, which cannot be copied then
    model.eval(), pruned.eval()
    torch.manual_seed(SEED)
    with torch.no_grad():
        before += _call(model, example)
    after = _call(pruned, example)
    _same_ranks_and_shapes(before, after, example)
    finite = all(t.isfinite().all() for t in before if t.is_floating_point())
    if finite and not all(t.isfinite().all() for t in after if t.is_floating_point()):
        raise CheckFailed("the pruned model returns values that are not finite")
    parameters = [p for p in pruned.parameters() if p.requires_grad]
    sum(t.float().mean() for t in after if t.requires_grad).backward()
    reached = sum(p.grad is not None for p in parameters)
    if not reached:
        raise CheckFailed("no parameter gets a gradient in evaluation mode")
    return True


def _same_ranks_and_shapes(before: list[Tensor], after: list[Tensor], example: Any) -> None:
    """Shapes agree, in dimensions that do not depend on the values of the input."""
    if len(before) != len(after):
        raise CheckFailed(f"{len(after)} outputs, expected {len(before)}")
    varying = isinstance(example, tuple) and any(isinstance(e, list) for e in example)
    for a, b in zip(_shapes(before), _shapes(after), strict=True):
        if a[varying:] != b[varying:]:
            raise CheckFailed(f"output shape {b}, expected {a}")


def doubled(tree: Any) -> Any:
    """Example inputs with a batch of two."""
    if isinstance(tree, Tensor):
        return torch.cat([tree, tree * 0.9 if tree.is_floating_point() else tree])
    if isinstance(tree, Mapping):
        return {key: doubled(item) for key, item in tree.items()}
    if isinstance(tree, tuple):
        return tuple(doubled(item) for item in tree)
    return tree


def _gradients(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    """Train-mode forward and backward; the output shapes."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(1)
    made = _call(model, doubled(example))
    differentiable = [t for t in made if t.requires_grad]
    if not differentiable:
        raise CheckFailed("no output has a gradient in training mode")
    sum(t.float().mean() for t in differentiable).backward()
    if not any(p.grad is not None for p in model.parameters()):
        raise CheckFailed("no parameter gets a gradient in training mode")
    return _shapes(made)


def _in_training(model: nn.Module, example: Any) -> list[tuple[int, ...]]:
    """Output shapes in training mode."""
    model = copy.deepcopy(model).train()
    torch.manual_seed(1)
    with torch.no_grad():
        return _shapes(_call(model, doubled(example)))


def _failure(check: Callable[[], Any]) -> str:
    """How a check fails; empty where it does not."""
    try:
        check()
    except Exception as error:  # noqa: BLE001  how it fails is a result
        return f"{type(error).__name__}: {error}"
    return ""


def _train(model: nn.Module, pruned: nn.Module, example: Any, result: Result) -> bool | None:
    expected: list[tuple[int, ...]] = []
    own = _failure(lambda: expected.extend(_in_training(model, example)))
    try:
        found = [] if own else _gradients(pruned, example)
    except Exception:
        own = _failure(lambda: _gradients(model, example))
        if not own:
            raise
    if own:
        _note(result, f"original in training mode: {own}")
        return None
    if result["captured"] or found == expected:
        return True  # a captured model returns in both modes what the original does in evaluation
    if [shape[:1] for shape in found] != [shape[:1] for shape in expected]:
        raise CheckFailed(f"training-mode outputs {found}, expected {expected}")
    _note(result, "training mode also returns inner feature maps, which are narrower now")
    return True


def _dropped(graph: Graph, pruned: nn.Module, result: Result) -> bool:
    planned = graph.params(half(graph).counts)
    if result["params_after"] != planned:
        raise CheckFailed(f"{result['params_after']} parameters, the formulas say {planned}")
    if planned >= graph.params():
        raise CheckFailed("no parameter was removed")
    return True


def _nothing(model: nn.Module, graph: Graph, example: Any, before: list[Tensor]) -> bool | None:
    """The captured form of the untouched model computes the same."""
    model.eval()
    try:
        _same_when_captured(model, graph, example, before, free_batch=True)
    except Exception:  # noqa: BLE001  how it fails is a result
        _same_when_captured(model, graph, example, before, free_batch=False)
    return True


def _same_when_captured(
    model: nn.Module, graph: Graph, example: Any, before: list[Tensor], *, free_batch: bool
) -> None:
    copied = copy.deepcopy(model)
    captured = capture(copied, model, graph, Plan({}), free_batch=free_batch).eval()
    torch.manual_seed(SEED)
    with torch.no_grad():
        after = _call(captured, example)
    _same_ranks_and_shapes(before, after, example)
    worst = _difference(before, after)
    if not worst <= TOLERANCE:
        raise CheckFailed(f"the captured model differs by {worst:.2e}")


RANKING = ("aten::topk", "aten::sort", "aten::argsort", "torchvision::nms")
"""Operators that order what they return by value, so that rounding decides between near ties."""


def _difference(before: list[Tensor], after: list[Any], *, ranks: bool = False) -> float:
    """Largest difference of any output over the largest value of that output.

    With ``ranks``, rows that come in another order are compared with the row most like them.
    """
    worst = 0.0
    for a, b in zip(before, after, strict=True):
        x, y = np.asarray(a.detach(), dtype=np.float64), np.asarray(b, dtype=np.float64)
        if x.size and x.shape == y.shape:
            scale = max(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)), 1e-6)
            found = _largest(x, y) / scale
            if found > TOLERANCE and ranks and x.ndim > 0 and 1 < len(x) <= MOST_ROWS:
                found = _by_rows(x.reshape(len(x), -1), y.reshape(len(y), -1)) / scale
            worst = max(worst, found)
    return worst


MOST_ROWS = 1000


def _largest(x: Any, y: Any) -> float:
    same = (x == y) | (np.isnan(x) & np.isnan(y))
    return float(np.where(same, 0.0, np.abs(x - y)).max())


def _by_rows(x: Any, y: Any) -> float:
    """The largest distance of a row on either side from its nearest on the other."""
    apart = np.array([np.abs(row - y).max(1) for row in x])
    return float(max(apart.min(0).max(), apart.min(1).max()))


class _Flat(nn.Module):
    """Takes the tensors of an example flat, as ONNX does, and calls the model as it wants."""

    def __init__(self, model: nn.Module, example: Any) -> None:
        super().__init__()
        self.model = model
        self.example = example

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Give the model the example's structure, return its tensors flat."""
        return tuple(_call(self.model, _filled(self.example, iter(tensors))))


def _filled(tree: Any, tensors: Any) -> Any:
    if isinstance(tree, Tensor):
        return next(tensors)
    if isinstance(tree, Mapping):
        return {key: _filled(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_filled(item, tensors) for item in tree)
    return tree


def _export(model: nn.Module, pruned: nn.Module, example: Any, result: Result) -> bool | None:
    """Export and compare; the original is exported only where the pruned model does not pass."""
    result["checks"]["parity"] = False
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        error = _failure(lambda: _compare(pruned, example, path, result, "parity"))
        if not error and result["parity"] <= TOLERANCE:
            result["checks"]["parity"] = True
            return True
        own = _failure(lambda: _compare(model, example, path, result, "parity_original"))
    if own:
        _note(result, f"original in ONNX: {own}")
    if error and not own:
        raise CheckFailed(f"only the pruned model fails: {error}")
    if error:
        result["checks"]["parity"] = None
        return None
    _note(result, f"parity {result['parity']:.1e}")
    if not own:
        _note(result, f"parity of the original {result['parity_original']:.1e}")
        if not result["parity_original"] <= TOLERANCE:
            result["checks"]["parity"] = None
    return True


def _compare(model: nn.Module, example: Any, path: Path, result: Result, name: str) -> None:
    from prune2deploy.exporting.export import to_onnx

    tensors = tuple(tensors_in(example))
    to_onnx(_Flat(model, example), tensors, path)
    result[name] = _onnx_difference(model, example, tensors, path, ranks=result["ranks"])


def _onnx_difference(
    model: nn.Module, example: Any, tensors: Any, path: Path, *, ranks: bool = False
) -> float:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = 1
    settings.log_severity_level = 4
    session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    taken = {i.name for i in session.get_inputs()}
    names = ["input"] if len(tensors) == 1 else [f"input_{i}" for i in range(len(tensors))]
    feeds = {n: t.numpy() for n, t in zip(names, tensors, strict=True) if n in taken}
    found = session.run(None, feeds)
    with torch.no_grad():
        return _difference(_call(model.eval(), example), found, ranks=ranks)


def _note(result: Result, text: str) -> None:
    result["note"] = (result.get("note", "") + " " + text[:200]).strip()


if __name__ == "__main__":
    main()
