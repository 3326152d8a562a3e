"""The sub-commands that work on an ONNX file: ``measure`` and ``build``.

In: parsed arguments and a progress callable. Out: a :class:`~prune2deploy.reply.Reply`.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from prune2deploy import config
from prune2deploy.errors import BuildError, ConfigError
from prune2deploy.progress import Progress
from prune2deploy.reply import Reply, refuse, shown
from prune2deploy.rundir import writing

if TYPE_CHECKING:
    from prune2deploy.backends.base import Backend, Engine
    from prune2deploy.backends.fixed_shapes import Wanted
    from prune2deploy.target import Target


def measure(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Measure an ONNX file, alone or against another; or probe the widths of the target."""
    if (arguments.onnx is None) != arguments.probe_alignment:
        raise ConfigError("measure: expected either an ONNX file or --probe-alignment")
    if arguments.probe_alignment:
        refuse(
            arguments, "against batch input_size", "beside --probe-alignment, which reads no file"
        )
        return _staircase(arguments, progress)
    refuse(
        arguments, "out no_cache", "without --probe-alignment, which alone writes and keeps files"
    )
    wanted = _wanted(arguments)
    from prune2deploy import listing
    from prune2deploy import measure as measuring
    from prune2deploy.journal import encode
    from prune2deploy.report.text import alone_text, pair_text

    target, backend = listing.usable(arguments.target)
    pair = [path for path in (arguments.onnx, arguments.against) if path is not None]
    for path in pair:
        _check_onnx(path)
    with tempfile.TemporaryDirectory(prefix="prune2deploy-") as folder:
        engines = [
            _engine(path, Path(folder) / str(number), (target, backend), wanted)
            for number, path in enumerate(pair)
        ]
        if len(engines) == 1:
            alone = measuring.single(engines[0], target)
            return Reply(alone_text(arguments.onnx, alone), encode(alone))
        seen = measuring.compare(engines[0], engines[1], target)
    return Reply(pair_text(arguments.onnx, arguments.against, seen), encode(seen))


def _wanted(arguments: argparse.Namespace) -> Wanted:
    size = None if arguments.input_size is None else config.parse_size(arguments.input_size)
    if arguments.batch is not None:
        config.at_least("--batch", arguments.batch, 1)
    from prune2deploy.backends.fixed_shapes import Wanted

    return Wanted(arguments.batch, size)


def _engine(path: Path, folder: Path, where: tuple[Target, Backend], wanted: Wanted) -> Engine:
    """Build an engine whose inputs are of fixed shapes, all in the folder."""
    from prune2deploy.backends import fixed_shapes

    target, backend = where
    return backend.build(fixed_shapes.fixed(path, folder / "onnx", wanted), target, folder)


def _staircase(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Probe the channel multiple; table, picture and JSON."""
    from prune2deploy import listing
    from prune2deploy.search import probing, recall

    target, backend = listing.usable(arguments.target)
    timings = recall.timings(target, backend, cache=not arguments.no_cache)
    found = probing.probe(target, backend, timings, progress)
    written = probing.write(target, found, arguments.out or Path())
    lines = ["", *(f"written {shown(path)}" for path in written), *timings.notes]
    return Reply("\n".join([probing.text(target, found), *lines]), probing.document(target, found))


def build(arguments: argparse.Namespace, progress: Progress) -> Reply:
    """Build an engine without measuring."""
    from prune2deploy import listing
    from prune2deploy.backends import registry

    target, backend = listing.usable(arguments.target, to_run=False)
    target = registry.in_precision(target, arguments.precision)
    _check_onnx(arguments.onnx)
    out: Path = arguments.out
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    from prune2deploy.search import lowering

    options = lowering.LoweringOptions(
        target.precision, backend.int8_recipe(target), method=target.int8_ranges
    )
    lowered = lowering.lower_file(arguments.onnx, out, options, arguments.data, progress)
    engine = backend.build(lowered.path, target, out)
    document = {
        "engine": str(engine.path.resolve()),
        "onnx": str(lowered.path.resolve()),
        "bytes": engine.path.stat().st_size,
        "seconds": engine.seconds,
        "target": target.name,
        "precision": target.precision,
        "versions": backend.versions(),
    }
    text = "\n".join([_built_text(engine, target), *lowered.notes])
    return Reply(text, {**document, "notes": list(lowered.notes)})


def _check_onnx(path: Path) -> None:
    from prune2deploy.backends import onnx_file

    try:
        onnx_file.check(path)
    except BuildError as error:
        raise ConfigError(str(error)) from error


def _built_text(engine: Engine, target: Target) -> str:
    size = engine.path.stat().st_size / 1e6
    return f"{engine.path}: {size:.2f} MB for {target.name}, built in {engine.seconds:.1f} s"
