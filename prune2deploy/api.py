"""The Python interface: trace, prune, prune to a budget.

In: a module and example inputs. Out: new values; the module that was given is never changed. Calls
from several threads wait for one another.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from prune2deploy import config, loop, summary
from prune2deploy import target as targets
from prune2deploy.calibration import given_batches
from prune2deploy.config import RunOptions
from prune2deploy.errors import ConfigError
from prune2deploy.extras import Extras, Held, check, names
from prune2deploy.extras import options as run_options
from prune2deploy.graph import Graph, require_prunable
from prune2deploy.graph import trace as trace_graph
from prune2deploy.graph.calling import state_tensors
from prune2deploy.graph.trace import mistaken, unwrap
from prune2deploy.identity import content
from prune2deploy.importance import DATA_FREE, NAMES, score
from prune2deploy.measure import Comparison
from prune2deploy.models.weights import load_weights
from prune2deploy.naming import in_python, spelled
from prune2deploy.plan.allocate import channels
from prune2deploy.plan.choices import importance_curves
from prune2deploy.plan.plan import Plan
from prune2deploy.progress import silent
from prune2deploy.report.content import RunReport
from prune2deploy.rundir import RunDir, run_folder
from prune2deploy.search.job import Job
from prune2deploy.surgery.classes import traced
from prune2deploy.surgery.copying import copied
from prune2deploy.surgery.slicing import apply as apply_plan
from prune2deploy.sweep import uniform_counts

_FLOATS = (torch.float16, torch.float32, torch.float64)
_ALONE = threading.RLock()  # recording and exporting change state of torch that threads share


@contextlib.contextmanager
def _entry() -> Iterator[None]:
    """Stand around every public function: one call at a time, errors name Python parameters."""
    with _ALONE, in_python():
        yield


@dataclass(frozen=True, eq=False)
class Result:
    """What :func:`prune_to_budget` gives back.

    Attributes:
        module: The pruned module.
        plan: Kept channels of every axis that lost some.
        met: Whether the measured latency meets the budget.
        verdict: ``met``, ``missed``, ``unreachable`` or ``uncertain``.
        measurement: The final model measured interleaved with the baseline, in milliseconds.
        measurements: The same of every model that was tried, in order.
        report: What ``report.json`` holds.
        run_dir: Folder with ``model.onnx``, the engine, ``manifest.json``, ``report.html`` ...
    """

    module: nn.Module
    plan: Plan
    met: bool
    verdict: str
    measurement: Comparison
    measurements: tuple[Comparison, ...]
    report: RunReport
    run_dir: Path


@_entry()
def trace(model: nn.Module, example_inputs: Any) -> Graph:
    """Find the axes of a model: sets of coupled channels that live and die together.

    Args:
        model: Any module.
        example_inputs: One tensor, a tuple of positional arguments, or a dict of keywords.

    Returns:
        The graph; each of ``.axes`` has ``name``, ``size`` (channels), ``members`` (tensor and
        dimension) and ``frozen`` (why it cannot be pruned, or ``None``).

    Raises:
        TraceError: The forward pass fails, returns no tensor, or has nothing to prune.
    """
    return trace_graph(model, example_inputs)


@_entry()
def prune(
    model: nn.Module,
    example_inputs: Any,
    ratio: float = 0.5,
    importance: str = RunOptions.importance,
    channel_multiple: int = 1,
    keep: Sequence[str] | None = None,
    **held: Unpack[Held],
) -> nn.Module:
    """Remove the same fraction of every axis that can be pruned.

    Args:
        model: Any module; it is not changed.
        example_inputs: One tensor, a tuple of positional arguments, or a dict of keywords.
        ratio: Fraction of the channels to remove, from 0 up to but not including 1.
        importance: Criterion that chooses the channels; one that needs no data.
        channel_multiple: Kept widths are multiples of this (rounded to the nearest, at least one).
        keep: Names or patterns of layers (``"layer1"``, ``"*.qkv"``) whose outputs keep all their
            channels.
        held: What else is not to change, see :class:`Held`.

    Returns:
        A new, smaller module.

    Raises:
        ConfigError: A ratio outside [0, 1), a criterion that is unknown or needs data, or a name
            in ``keep`` that fits nothing.
        TraceError: The forward pass fails, returns no tensor, or has nothing to prune, be it that
            ``keep`` names everything.
    """
    if not (config.is_number(ratio) and 0 <= ratio < 1):
        raise ConfigError(f"ratio: found {ratio!r}, expected a number from 0 to below 1")
    config.at_least("channel_multiple", channel_multiple, 1)
    if config.one_of("importance", importance, NAMES) not in DATA_FREE:
        raise ConfigError(
            f"importance {importance!r} looks at data, which prune() takes none of; choose one of "
            f"{', '.join(DATA_FREE)}, or use prune_to_budget(..., batches=...)"
        )
    _require_there(unwrap(model))
    check("prune", held, Held)
    same_class = held.get("keep_class", False)
    graph = traced(model, example_inputs, names("keep", keep), same_class=same_class)
    require_prunable(graph)
    scores = score(importance, model, graph)
    curves = importance_curves(graph, scores)
    counts = uniform_counts(graph, curves, ratio, channel_multiple)
    return apply_plan(model, graph, channels(graph, scores, counts), example_inputs)


@_entry()
def load_pruned(model: nn.Module, example_inputs: Any, run_dir: Path | str) -> nn.Module:
    """Load the pruned model of a run with its original code: ``plan.json`` and ``weights.pt``.

    No code is unpickled. Without the original code, load ``model.pt2`` with ``torch.export.load``.

    Args:
        model: The model as it was before pruning; its weights do not matter and do not change.
        example_inputs: One tensor, a tuple of positional arguments, or a dict of keywords.
        run_dir: A run directory, or any folder with these two files.

    Returns:
        The pruned module, in evaluation mode.

    Raises:
        ConfigError: There is no ``plan.json``.
        PlanError: The plan is of another model, or not a plan.
        ModelError: The weights are missing, or of another model.
    """
    file = Path(run_dir) / "plan.json"
    if not file.is_file():
        raise ConfigError(f"no file {str(file)!r} found; expected a run directory with a plan")
    graph = trace_graph(model, example_inputs)
    pruned = apply_plan(model, graph, Plan.from_json(file.read_bytes()), example_inputs)
    load_weights(pruned, file.with_name("weights.pt"))
    return pruned.eval()


@_entry()
def prune_to_budget(
    model: nn.Module,
    example_inputs: Tensor | tuple[Tensor, ...],
    *,
    target: str | Path,
    budget_ms: float | None = None,
    speedup: float | None = None,
    finetune: Callable[[nn.Module], nn.Module | None] | None = None,
    **extras: Unpack[Extras],
) -> Result:
    """Prune a model until its latency, measured on the target, meets a budget.

    Args:
        model: Any module; it is not changed.
        example_inputs: One tensor, or the positional arguments of the forward pass.
        target: Name of a target profile (``prune2deploy targets`` lists them), or a path.
        budget_ms: Greatest latency in milliseconds of wall time; give this or ``speedup``.
        speedup: Latency of the model as it is over the latency wanted; above 1.
        finetune: Your own training: called once with the pruned module, which it trains in place
            (or returns another one of the same shapes).
        extras: Less common settings, see :class:`Extras`.

    Returns:
        The result; look at ``met`` before shipping it.

    Raises:
        ConfigError: A wrong option, or a run directory that cannot be used.
        TraceError: The model does not run or has nothing to prune.
        MissingBackend: The target cannot be used here.
        ParityError: An engine gives other outputs than the pruned module.
    """
    inputs = _inputs(model, example_inputs, finetune)
    name = type(model).__name__
    options = run_options(name, str(target), (budget_ms, speedup), extras)
    profile = targets.load(target)
    batches, resume = given_batches(extras.get("batches")), extras.get("resume", False)
    input_names = names("input_names", extras.get("input_names"))
    output_names = names("output_names", extras.get("output_names"))
    identity = {
        **options.identity(),
        "profile": profile.sha256,
        "finetune": finetune is not None,
        "names": (input_names, output_names),
        "content": content(model, inputs, extras.get("batches")),
    }
    label = f"{name}-{profile.name}-{options.budget.label}"
    place = extras.get("run_dir") or run_folder(label, identity, resume=resume)
    with RunDir(Path(place), identity, resume=resume) as run:
        job = Job(
            module=copied(model, {}),  # a forward pass may write into the weights
            example_inputs=inputs,
            target=profile,
            run=run,
            batches=batches,
            finetune=finetune,
            input_names=input_names,
            output_names=output_names,
            progress=extras.get("progress") or silent,
            spelled=spelled,
        )
        return carry_out(job, options, name)


def _inputs(model: nn.Module, example: object, finetune: object) -> tuple[Tensor, ...]:
    """Check model and training function; return the positional arguments of the forward pass."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model: {mistaken(model)}")
    _require_there(model)
    given = example if isinstance(example, tuple | list) else (example,)
    others = [
        f"{type(one).__name__} at {i}" for i, one in enumerate(given) if not isinstance(one, Tensor)
    ]
    if others or not given:
        raise ConfigError(
            f"example_inputs: found {', '.join(others) or 'none'}, expected tensors; wrap the "
            "model in a module that takes tensors alone"
        )
    if finetune is not None and not callable(finetune):
        raise ConfigError(
            f"finetune: found a {type(finetune).__name__}, expected a function that trains the "
            "module that it is given"
        )
    for name, held in state_tensors(model).items():
        _require_exportable(name, held)
    for place, one in enumerate(given):
        _require_exportable(f"example_inputs[{place}]", one)
    return tuple(given)


def _require_exportable(what: str, held: Tensor) -> None:
    """Raise ConfigError at a weight or an input that no ONNX file can be compared on."""
    if held.is_floating_point() and held.dtype not in _FLOATS:
        raise ConfigError(
            f"found {what} in {str(held.dtype).removeprefix('torch.')}, which ONNX Runtime cannot "
            "compare, expected float32: give model.float() and example inputs in float32"
        )
    if held.layout != torch.strided:
        raise ConfigError(
            f"found {what} of layout {held.layout}, for which ONNX has no form, expected a dense "
            "tensor: give tensor.to_dense(), or stop at prune(), which takes it"
        )


def _require_there(model: nn.Module) -> None:
    """Raise ConfigError where a parameter is on the device ``meta``, which holds no values."""
    for name, held in model.named_parameters():
        if held.is_meta:
            raise ConfigError(
                f"model: found {name} on the device 'meta', expected weights with values; load them"
            )


def carry_out(job: Job, options: RunOptions, name: str) -> Result:
    """Run the loop, then write artefacts, report and manifest."""
    job.run.journal.open_session()
    outcome = loop.prune_to_budget(job, options)
    report = summary.finish(job, outcome, job.run.journal.seconds(), name)
    if not outcome.starved:  # else --resume with more builds goes on from them
        job.run.clear_work()
    return Result(
        module=outcome.module,
        plan=outcome.final.built.plan,
        met=report.met,
        verdict=outcome.verdict,
        measurement=outcome.final.comparison,
        measurements=tuple(a.comparison for a in outcome.attempts),
        report=report,
        run_dir=job.run.path,
    )
