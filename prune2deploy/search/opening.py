"""Before the search: a usable target, the traced model, the measured baseline.

In: a :class:`~prune2deploy.search.job.Job` and the options of the model. Out: the
:class:`~prune2deploy.search.candidate.Workshop` that every build shares, and the baseline.
"""

from __future__ import annotations

import torch

from prune2deploy import measure
from prune2deploy.backends import registry
from prune2deploy.calibration import check_form, check_labels, filled, require, serves
from prune2deploy.config import ModelOptions, check_max_drop
from prune2deploy.errors import ConfigError, MissingBackend
from prune2deploy.exporting import export
from prune2deploy.graph import Graph, require_prunable
from prune2deploy.graph.calling import quiet
from prune2deploy.journal import Journal
from prune2deploy.measure import Measurement
from prune2deploy.progress import Step
from prune2deploy.recover import Training
from prune2deploy.search import candidate
from prune2deploy.search.candidate import Built, Workshop
from prune2deploy.search.job import Baseline, Job
from prune2deploy.surgery.classes import traced

_RUN_ON = ("importance", "bn", "sensitivity", "finetune")  # purposes that run the model on data


def open_workshop(
    job: Job, options: ModelOptions, builds: int, max_drop: float | None = None
) -> Workshop:
    """Check that the target is usable, and trace the model; ``builds`` is for progress."""
    target = registry.in_precision(job.target, options.precision)
    check_max_drop(max_drop, target.precision, data=job.batches is not None)
    check_form(job.batches)
    if max_drop is not None:
        require(job.batches, "evaluate")
    if target.precision == "int8":
        if job.batches is None:
            raise ConfigError("precision int8 needs calibration data: add --data RECIPE")
        require(job.batches, "int8")
    backend = registry.for_target(target)
    there = backend.availability(target)
    if not there.usable:
        raise MissingBackend(f"target {target.name}: {there.reason}; {there.fix}")
    graph = _traced(job, options)
    require_prunable(graph)
    if job.batches is not None:
        check_labels(job.batches, _output_shapes(job))
        _check_batch(job)
    if isinstance(job.finetune, Training):
        job.finetune.rehearse(job.module)
    return Workshop(
        module=job.module,
        example_inputs=job.example_inputs,
        graph=graph,
        target=target,
        backend=backend,
        run=job.run,
        progress=job.progress,
        total=builds,
        input_names=job.input_names or export.input_names(len(job.example_inputs), job.module),
        output_names=job.output_names,
        batches=job.batches,
        max_drop=max_drop,
        before=_before(job.run.journal),
    )


def _traced(job: Job, options: ModelOptions) -> Graph:
    """The graph; which widths the model's code follows takes a while to try."""
    if options.keep_class:
        job.progress(Step("trying which widths the model's code follows", 0, 0))
    return traced(job.module, job.example_inputs, options.keep, same_class=options.keep_class)


def _before(journal: Journal) -> int:
    """How many builds a run has behind it, the baseline among them."""
    built = (journal.read(key, Built) for key in journal.keys if key.endswith("/build"))
    return max((one.number + 1 for one in built), default=0)


def _check_batch(job: Job) -> None:
    """Run the model on one sample more than its example inputs hold: it must take any batch.

    Raises:
        ConfigError: It fails, and the data serves a purpose for which it is given to the model.
    """
    if not any(serves(job.batches, purpose) for purpose in _RUN_ON):
        return
    example = job.example_inputs[0]
    inputs = tuple(one.to(example.device) for one in next(filled(job.batches, len(example) + 1)))
    try:
        with quiet(job.module):
            job.module(*inputs)
    except Exception as error:  # the user's code may refuse such inputs in any way
        shapes = [tuple(one.shape) for one in inputs]
        raise ConfigError(
            f"data: the model fails on inputs of shapes {shapes}, expected one that takes them in "
            f"any batch, as it takes {len(example)} as its example inputs "
            f"({type(error).__name__}: {error}); export it with a free batch dimension, correct "
            f"the data, or have its recipe list none of the purposes {', '.join(_RUN_ON)}"
        ) from error


def _output_shapes(job: Job) -> list[tuple[int, ...]]:
    with torch.no_grad():
        outputs = export.flatten(job.module(*job.example_inputs))
    return [tuple(tensor.shape) for tensor in outputs.values()]


def measure_baseline(shop: Workshop) -> Baseline:
    """Build, profile and measure the unpruned model."""
    built = candidate.baseline(shop)
    profile = candidate.profile(shop, built)

    def work() -> Measurement:
        shop.say("measuring", 0)
        return measure.single(
            shop.engine(built), shop.target, raw_path=shop.run / "raw/baseline.npz"
        )

    measured = shop.run.journal.once(f"{built.key}/measure", Measurement, work)
    return Baseline(built, profile, measured)
