"""What each sub-command does; those that work on an ONNX file are in ``file_commands``.

In: parsed arguments and a progress callable. Out: a :class:`~prune2deploy.reply.Reply` (text for
people, one plain document for programs, an exit code). Options are checked before any library is
imported, so that a mistake in them is told at once.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prune2deploy import atomic, config, file_commands
from prune2deploy.config import Budget, ModelOptions, RunOptions, SweepOptions
from prune2deploy.progress import Progress, tell
from prune2deploy.reply import Reply, refuse, shown
from prune2deploy.rundir import (
    IDENTITY,
    RunDir,
    read_manifest,
    run_folder,
    writing,
)

if TYPE_CHECKING:
    from prune2deploy.models import LoadedModel
    from prune2deploy.search.job import Job
    from prune2deploy.target import Target

_RANDOM = "weights are random, as --weights names none: look at the latency, not at the outputs"


def run(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Prune until the budget is met."""
    options = _run_options(arguments)
    with _working(arguments, options, options.budget.label, progress) as job:
        from prune2deploy import api, summary
        from prune2deploy.report import write

        result = api.carry_out(job, options, options.model.model)
    folder = job.run.path
    text = f"{write.show(result.report)}\nrun       {shown(folder)}"
    document = {**read_manifest(folder), "run_dir": str(folder)}
    return Reply(text, document, summary.EXIT_CODES[result.verdict])


def sweep(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Measure latency against the pruning ratio."""
    options = SweepOptions(
        target=arguments.target,
        ratios=config.parse_ratios(arguments.ratios),
        model=_model_options(arguments, arguments.precision),
        importance=arguments.importance,
        data=arguments.data,
    )
    with _working(arguments, options, "sweep", progress) as job:
        from prune2deploy import sweep as sweeping
        from prune2deploy.journal import encode
        from prune2deploy.report import write

        report = sweeping.sweep(job, options, options.model.model)
    text = f"{write.show(report)}\n\nrun {shown(job.run.path)}"
    return Reply(text, {**encode(report), "run_dir": str(job.run.path)})


def inspect(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Show the axes of a model."""
    options = _model_options(arguments)
    from prune2deploy import inspection
    from prune2deploy.surgery.classes import traced

    loaded = _load(options)
    graph = traced(
        loaded.module, loaded.example_inputs, options.keep, same_class=options.keep_class
    )
    return Reply(inspection.text(options.model, graph), inspection.document(options.model, graph))


def targets(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Show every target profile, and whether it is usable here."""
    from prune2deploy import listing

    rows = listing.rows()
    return Reply(listing.text(rows), rows)


def report(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Render a run again, or compare several."""
    from prune2deploy.journal import encode
    from prune2deploy.report import html, text, write

    paths: list[Path] = arguments.runs
    if len(paths) == 1:
        refuse(arguments, "out", "beside a single run, which is rendered in its own folder")
        one = write.load(paths[0])
        with RunDir(paths[0], _held_identity(paths[0]), resume=True) as held:
            held.relist(write.write(one, held))
        return Reply(write.show(one), encode(one))
    found = write.comparable(paths)
    if arguments.out is not None:
        with writing(arguments.out):
            atomic.write_text(arguments.out / "compare.html", html.compare_page(found))
    return Reply(text.compare_text(found), {name: encode(one) for name, one in found})


TABLE: Mapping[str, Callable[[argparse.Namespace, Progress], Reply]] = {
    "run": run,
    "sweep": sweep,
    "measure": file_commands.measure,
    "build": file_commands.build,
    "inspect": inspect,
    "targets": targets,
    "report": report,
}


def _model_options(arguments: argparse.Namespace, precision: str | None = None) -> ModelOptions:
    size = arguments.input_size
    return ModelOptions(
        model=arguments.model,
        weights=arguments.weights,
        input_size=None if size is None else config.parse_size(size),
        batch=arguments.batch,
        precision=precision,
        seed=arguments.seed,
        keep=tuple(arguments.keep),
        keep_class=arguments.keep_class,
    )


def _run_options(arguments: argparse.Namespace) -> RunOptions:
    return RunOptions(
        budget=Budget(arguments.latency_ms, arguments.speedup, arguments.percentile),
        target=arguments.target,
        model=_model_options(arguments, arguments.precision),
        data=arguments.data,
        importance=arguments.importance,
        finetune_epochs=arguments.finetune,
        max_builds=arguments.max_builds,
        max_drop=arguments.max_drop,
        cache=not arguments.no_cache,
        max_size_mb=arguments.max_size_mb,
        max_macs=None if arguments.max_macs is None else config.whole(arguments.max_macs),
        max_pruning_ratio=arguments.max_pruning_ratio,
    )


def _load(options: ModelOptions) -> LoadedModel:
    from prune2deploy import models

    return models.load(
        options.model,
        weights=options.weights,
        input_size=options.input_size,
        batch=options.batch,
        seed=options.seed,
    )


@contextlib.contextmanager
def _working(
    arguments: argparse.Namespace,
    options: RunOptions | SweepOptions,
    ending: str,
    progress: Progress,
) -> Iterator[Job]:
    """Check the options, load model and data, and hold the run directory meanwhile.

    Args:
        arguments: As parsed.
        options: The same, checked.
        ending: Last part of the name of a new run directory.
        progress: Hears of notices and steps.
    """
    from prune2deploy import listing

    target, _ = listing.usable(options.target)
    purposes = _purposes(options, target)
    from prune2deploy import calibration
    from prune2deploy.search.job import Job

    loaded = _load(options.model)
    batches = _data(options.data, loaded, purposes)
    random = (_RANDOM,) if loaded.random else ()
    tell(progress, [*random, *loaded.notices, *calibration.notices(batches)])
    label = f"{_short(options.model.model)}-{target.name}-{ending}"
    with _opened(arguments, label, _identity(options, target, loaded, batches)) as held:
        if arguments.resume and not held.begun:
            tell(progress, [f"{shown(held.path)} holds no run to go on with; a new one begins"])
        yield Job(
            module=loaded.module,
            example_inputs=loaded.example_inputs,
            target=target,
            run=held,
            batches=batches,
            finetune=_finetune(options, loaded, batches),
            input_names=loaded.input_names,
            output_names=loaded.output_names,
            progress=progress,
        )


def _purposes(options: RunOptions | SweepOptions, target: Target) -> set[str]:
    """Check the criterion and ``--max-drop``; return the purposes that data is needed for."""
    from prune2deploy.importance import CRITERIA, NAMES, require_data

    config.one_of("--importance", options.importance, NAMES)
    precision = options.model.precision or target.precision
    wanted = {"int8"} if precision == "int8" else set()
    if CRITERIA[options.importance].needs_data:
        require_data(options.importance, given=options.data is not None)
        wanted |= {"importance"}
    if isinstance(options, RunOptions):
        config.check_max_drop(options.max_drop, precision, data=options.data is not None)
        wanted |= {"evaluate"} if options.max_drop is not None else set()
        wanted |= {"finetune"} if options.finetune_epochs else set()
    return wanted


def _data(recipe: str | None, loaded: LoadedModel, purposes: set[str]) -> Any:
    """Open the recipe and check that it serves every purpose that data is needed for."""
    if recipe is None:
        return None
    from prune2deploy import calibration

    batches = calibration.open_recipe(recipe, loaded)
    for purpose in sorted(purposes):
        batches.need(purpose)
    return batches


def _finetune(options: RunOptions | SweepOptions, loaded: LoadedModel, batches: Any) -> Any:
    """The built-in fine-tuning, with the unpruned model as teacher; ``None`` without epochs."""
    if isinstance(options, SweepOptions) or not options.finetune_epochs:
        return None
    from prune2deploy.recover import FinetuneOptions, Training

    settings = FinetuneOptions(epochs=options.finetune_epochs, seed=options.model.seed)
    return Training(loaded.module, batches, settings)


def _identity(
    options: RunOptions | SweepOptions, target: Target, loaded: LoadedModel, batches: Any
) -> dict[str, Any]:
    """What must agree for one command to go on from another: options, profile and content."""
    from prune2deploy.identity import content

    return {
        "command": "run" if isinstance(options, RunOptions) else "sweep",
        **options.identity(),
        "profile": target.sha256,
        "content": content(loaded.module, loaded.example_inputs, batches),
    }


@contextlib.contextmanager
def _opened(
    arguments: argparse.Namespace, label: str, identity: dict[str, Any]
) -> Iterator[RunDir]:
    """Hold the folder of ``--out``; without it a new one, or with ``--resume`` that of the run."""
    place = arguments.out or run_folder(label, identity, resume=arguments.resume)
    with RunDir(Path(place), identity, resume=arguments.resume) as held:
        try:
            yield held
        except KeyboardInterrupt as stop:  # Ctrl-C, or SIGTERM
            place = shlex.quote(shown(held.path))
            raise type(stop)(
                f"interrupted; go on with the same command and --resume --out {place}"
            ) from None


def _short(model: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in Path(model).name)


def _held_identity(path: Path) -> dict[str, Any]:
    import json

    try:
        return dict(json.loads((path / IDENTITY).read_text("utf-8")))
    except (OSError, ValueError, TypeError):  # opening the folder says what is wrong
        return {}
