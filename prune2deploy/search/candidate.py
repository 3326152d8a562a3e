"""One build: a plan becomes a pruned module, an ONNX file, an engine and its profile.

In: the shared :class:`Workshop` and a plan. Out: :class:`Built`, a plain value that the journal
keeps. Each finished part is journaled, so a run that was stopped takes up the next part.
"""

from __future__ import annotations

import io
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy import measure
from prune2deploy.backends.base import Backend, Engine, TensorSpec
from prune2deploy.calibration import filled
from prune2deploy.errors import ExportError
from prune2deploy.exporting import companions, export, keeping, parity, program, simplify
from prune2deploy.exporting.parity import Parity
from prune2deploy.graph.axes import Graph
from prune2deploy.measure import Comparison, Goal
from prune2deploy.plan.plan import Plan
from prune2deploy.progress import Progress, Step
from prune2deploy.rundir import WORK, RunDir
from prune2deploy.search import lowering
from prune2deploy.search.lowering import Lowered, LoweringOptions
from prune2deploy.surgery.slicing import apply as apply_plan
from prune2deploy.target import Target
from prune2deploy.timing import OperatorTiming

PROFILE_RUNS = 30


@dataclass(frozen=True)
class Border:
    """Parity of two stages that follow each other."""

    stages: str
    parity: Parity


@dataclass(frozen=True)
class Built:
    """One finished build. Paths are relative to the run directory, so that it may be moved.

    Attributes:
        number: 0 for the baseline, then counting up.
        step: ``baseline``, ``probe``, ``correction`` or ``final``.
        plan: What was kept.
        params: Parameters of the pruned model.
        macs: Multiply-accumulates of one inference.
        bytes: Size of the ONNX file, with weights that lie beside it.
        onnx: The ONNX file.
        engine: The engine file.
        seconds: Wall time of export, simplification and build.
        borders: Parity figures; empty for probes, which are never shipped.
        notes: What a reader of the report should know.
        lowered: How it came to its precision; ``None`` for fp32.
    """

    number: int
    step: str
    plan: Plan
    params: int
    macs: int
    bytes: int
    onnx: str
    engine: str
    seconds: float
    borders: tuple[Border, ...] = ()
    notes: tuple[str, ...] = ()
    lowered: Lowered | None = None

    @property
    def key(self) -> str:
        """Prefix of its journal keys."""
        return f"{self.number:02d}-{self.step}"


@dataclass(frozen=True, eq=False)
class Workshop:
    """What every build of a run shares.

    Attributes:
        module: The caller's model; never changed.
        example_inputs: What ``module(*example_inputs)`` takes.
        graph: Its graph.
        target: Where it runs, with the precision of this run.
        backend: The target's runtime.
        run: The run directory.
        progress: Hears of every step.
        total: Most builds there can be, for progress.
        input_names: Names of the inputs in the ONNX file.
        output_names: Names of the outputs in the ONNX file; empty likewise.
        batches: Calibration data, or ``None``.
        max_drop: Largest accuracy to lose to the precision; see ``lowering``.
    """

    module: nn.Module
    example_inputs: tuple[Tensor, ...]
    graph: Graph
    target: Target
    backend: Backend
    run: RunDir
    progress: Progress
    total: int
    input_names: tuple[str, ...]
    output_names: tuple[str, ...] = ()
    batches: Any = None
    max_drop: float | None = None
    started: float = field(default_factory=time.monotonic)

    def say(self, stage: str, number: int, detail: str = "") -> None:
        """Report progress; the remaining time extrapolates the time per build so far."""
        spent = time.monotonic() - self.started
        left = spent / number * max(0, self.total - number) if number else None
        self.progress(Step(stage, number, self.total, detail, left))

    def engine(self, built: Built) -> Engine:
        """The engine of a finished build."""
        return Engine(
            self.run / built.engine,
            self.run / built.onnx,
            self.backend.name,
            built.seconds,
            precision=built.lowered.precision if built.lowered else "fp32",
        )


def baseline(shop: Workshop) -> Built:
    """Build the unpruned model. Its build in a precision below fp32 has a name of its own."""
    wanted = shop.target.precision
    return build(shop, 0, "baseline" if wanted == "fp32" else f"baseline-{wanted}", Plan({}))


def build(shop: Workshop, number: int, step: str, plan: Plan) -> Built:
    """Prune, export, simplify and build by ``plan``, unless the journal has it already."""
    key = f"{number:02d}-{step}"

    def work() -> Built:
        shop.say("pruning", number)
        module = apply_plan(shop.module, shop.graph, plan, shop.example_inputs)
        return _assemble(shop, (number, step), plan, module)

    return shop.run.journal.once(f"{key}/build", Built, work)


def build_module(shop: Workshop, number: int, plan: Plan, module: nn.Module) -> Built:
    """Build a module whose weights were recovered after pruning by ``plan``."""
    return shop.run.journal.once(
        f"{number:02d}-final/build",
        Built,
        lambda: _assemble(shop, (number, "final"), plan, module),
    )


def profile(shop: Workshop, built: Built) -> tuple[OperatorTiming, ...]:
    """Time every operator of a build, unless the journal has it already.

    Times are those of a device as fast as it was when the unpruned model was profiled.
    """

    def work() -> Profile:
        beside = None
        if built.number:
            base = baseline(shop)
            beside = shop.engine(base), profile(shop, base)
        shop.say("profiling", built.number)
        return Profile(
            measure.profile(shop.engine(built), shop.target, runs=PROFILE_RUNS, beside=beside)
        )

    return shop.run.journal.once(f"{built.key}/profile", Profile, work).operators


def compare(shop: Workshop, built: Built, reference: Built, goal: Goal | None = None) -> Comparison:
    """Measure a build interleaved with the baseline, unless the journal has it already."""

    def work() -> Comparison:
        shop.say("measuring", built.number)
        return measure.compare(
            shop.engine(built),
            shop.engine(reference),
            shop.target,
            raw_path=shop.run / f"raw/{built.key}.npz",
            goal=goal,
        )

    return shop.run.journal.once(f"{built.key}/compare", Comparison, work)


@dataclass(frozen=True)
class Profile:
    """Timings of one engine, as the journal keeps them."""

    operators: tuple[OperatorTiming, ...]


def _assemble(shop: Workshop, name: tuple[int, str], plan: Plan, module: nn.Module) -> Built:
    number, step = name
    started = time.monotonic()
    notes: list[str] = []
    exported, onnx, lowered = _export(shop, name, module.eval(), notes)
    shop.say("building", number)
    if shop.backend.takes_program:
        program.save(module, shop.example_inputs, onnx.with_suffix(".pt2"), shop.target.precision)
    engine = shop.backend.build(onnx, shop.target, onnx.with_name("engine"))
    borders: tuple[Border, ...] = ()
    if step != "probe":
        shop.say("checking", number)
        borders = _check(shop, module, exported, (engine, lowered), notes)
    left = shop.graph.without(plan.removed)
    return Built(
        number=number,
        step=step,
        plan=plan,
        params=left.params(plan.counts),
        macs=left.macs(plan.counts),
        bytes=companions.size(onnx),
        onnx=_inside(shop.run, onnx),
        engine=_inside(shop.run, engine.path),
        seconds=time.monotonic() - started,
        borders=borders,
        notes=tuple(notes),
        lowered=lowered,
    )


def _export(
    shop: Workshop, name: tuple[int, str], module: nn.Module, notes: list[str]
) -> tuple[Path, Path, Lowered | None]:
    """Export, simplify, and bring to the precision of the run; adds to ``notes``.

    Returns:
        The file as exported, the file to build from, and how that came to its precision.
    """
    number, step = name
    folder = shop.run / f"{WORK}/{number:02d}-{step}"
    shop.say("exporting", number)
    exported = export.to_onnx(
        module,
        shop.example_inputs,
        folder / "exported.onnx",
        input_names=shop.input_names,
        output_names=shop.output_names,
        tell=notes.append,
    )
    shop.say("simplifying", number)
    samples = _random_samples(shop, exported)
    report = simplify.simplify(exported, folder / "simplified.onnx", samples=samples)
    if report.note:
        notes.append(f"simplification: {report.note}")
    onnx, lowered = _lower(shop, report.path, name)
    if lowered is not None:
        notes.append(lowered.text())
    return exported, onnx, lowered


def _inside(run: RunDir, path: Path) -> str:
    return path.resolve().relative_to(run.path).as_posix()


def _lower(shop: Workshop, path: Path, name: tuple[int, str]) -> tuple[Path, Lowered | None]:
    """Bring the ONNX file to the precision of the run.

    Only the unpruned model and the one that is shipped are calibrated on all data; what the
    unpruned one keeps in higher precision, every other one does too.
    """
    number, step = name
    out = path.with_name("model.onnx")
    wanted = shop.target.precision
    if wanted == "fp32":
        return path.rename(out), None
    shop.say(f"converting to {wanted}", number)
    whole = number == 0 or step == "final"
    options = LoweringOptions(
        precision=wanted,
        recipe=shop.backend.int8_recipe(shop.target),
        batches=shop.batches,
        keep=_kept_before(shop, path),
        quick=step == "probe" or (wanted == "int8" and not whole),
        max_drop=shop.max_drop,
        store=path.with_name("ranges.json"),
        samples=_random_samples(shop, path),
    )
    return out, lowering.lower(path, out, options)


def _kept_before(shop: Workshop, path: Path) -> tuple[str, ...]:
    """The nodes of a file whose counterparts the unpruned model keeps in higher precision."""
    first = f"00-baseline-{shop.target.precision}/build"
    built = shop.run.journal.read(first, Built) if first in shop.run.journal else None
    if built is None or built.lowered is None or not built.lowered.kept:
        return ()
    before = (shop.run / built.onnx).with_name(path.name)
    return keeping.counterparts(built.lowered.kept, before, path)


def _check(
    shop: Workshop,
    module: nn.Module,
    exported: Path,
    made: tuple[Engine, Lowered | None],
    told: list[str],
) -> tuple[Border, ...]:
    """Compare torch with the exported file, that with the lowered one, and that with the engine.

    Raises:
        ParityError: Two stages of a build that may be shipped disagree.
    """
    engine, lowered = made
    wanted = shop.target.precision
    samples = _samples(shop, exported)
    reference = parity.torch_runner(module, shop.input_names, shop.output_names)
    silent = parity.require_numbers(reference, samples)
    told += [
        f"parity shows little of output {name!r}: all its values are 0 or infinite"
        for name in silent
    ]
    found = [
        Border("torch and ONNX", parity.compare(reference, parity.onnx_runner(exported), samples))
    ]
    stage = "torch"
    if lowered is not None:
        found.append(Border(f"fp32 ONNX and {wanted} ONNX", lowered.parity))
        reference, stage = parity.onnx_runner(engine.onnx), f"{wanted} ONNX"
    with shop.backend.open(engine, shop.target) as session:
        run = cast(session.run, session.inputs)
        compared = parity.compare(
            reference, run, samples, precision=shop.backend.arithmetic(shop.target)
        )
    torch.set_flush_denormal(False)  # engines flush subnormals in the thread that opens them
    found.append(Border(f"{stage} and engine", compared))
    if lowered is not None:
        lowering.require(lowered, shop.max_drop)
    if lowered is None or not lowered.quick:
        require(found)
    return tuple(found)


def require(borders: Sequence[Border]) -> None:
    """Raise ParityError if two stages of a build disagree."""
    for border in borders:
        parity.require(border.parity, border.stages)


def cast(run: parity.Runner, inputs: Sequence[TensorSpec]) -> parity.Runner:
    """Have ``run`` take its inputs in any type: an fp16 engine wants fp16."""
    return lambda feeds: run({s.name: feeds[s.name].astype(s.dtype, copy=False) for s in inputs})


def _samples(shop: Workshop, exported: Path) -> Sequence[Mapping[str, Any]]:
    """Real inputs where there is data, else the example and one random input."""
    if shop.batches is not None:
        real = next(filled(shop.batches, len(shop.example_inputs[0])))
        return [parity.as_sample(real, shop.input_names)]
    return [
        parity.as_sample(shop.example_inputs, shop.input_names),
        *_random_samples(shop, exported),
    ]


def _random_samples(shop: Workshop, path: Path) -> Sequence[Mapping[str, Any]]:
    """One random input of a file that the model takes, as far as the example tells."""
    example = parity.as_sample(shop.example_inputs, shop.input_names)
    return parity.random_samples(path, like=example)


def save_weights(run: RunDir, module: nn.Module, name: str) -> None:
    """Save the state dict of a module; given a file, torch hides why it cannot be written."""
    data = io.BytesIO()
    torch.save(module.state_dict(), data)
    with run.place(name) as path:
        path.write_bytes(data.getbuffer())


def save_module(run: RunDir, module: nn.Module, example_inputs: tuple[Tensor, ...]) -> str:
    """Save the pruned module loadable with its code (``weights.pt``) and without (``.pt2``).

    Returns:
        Why ``model.pt2`` could not be written, or an empty text.
    """
    save_weights(run, module, "weights.pt")
    try:
        with run.place("model.pt2") as path:
            program.save(module, example_inputs, path)
    except ExportError as error:
        return (
            f"model.pt2 is missing because {error}; "
            "load it with its own code from weights.pt and plan.json"
        )
    return ""
