"""The command line: arguments in, one table or one JSON document out, an exit code.

In: ``argv``. Out: text on standard output (with ``--json`` exactly one JSON document there and
everything else on standard error). What each sub-command does is in ``commands``, imported only
once the arguments are known, so that ``--help`` needs no library. This module alone prints.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NoReturn

from prune2deploy import __version__, config
from prune2deploy.errors import ConfigError, Prune2DeployError
from prune2deploy.progress import NOTICE, Progress, Step
from prune2deploy.rundir import DISK_FULL, explain

INTERRUPTED, BUG = 130, 1
COMMANDS = ("run", "sweep", "measure", "build", "inspect", "targets", "report")
EPILOG = """exit codes: 0 budget met, 2 wrong usage or input, 3 target or dependency not available,
4 budget unreachable, 5 parity failed, 6 measurement too unstable to decide, 130 interrupted,
1 a bug of this program"""


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of this package, and that takes options in full."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError with the usage line."""
        raise ConfigError(f"{message}\n{self.format_usage().strip()}")


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = Parser(prog="prune2deploy", description=_first_line(), epilog=EPILOG)
    top.add_argument("--version", action="version", version=f"prune2deploy {__version__}")
    found = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    _run_arguments(found.add_parser("run", help="prune until the latency budget is met"))
    sweep = found.add_parser("sweep", help="measure latency against the pruning ratio")
    _model_arguments(sweep)
    _precision_argument(sweep)
    sweep.add_argument("--target", required=True, help="target profile")
    sweep.add_argument("--ratios", default="0:0.9:0.1", help="START:STOP:STEP or a list")
    sweep.add_argument("--importance", default="l2", help="criterion")
    sweep.add_argument("--data", help="calibration recipe, for int8 and criteria that need data")
    _output_arguments(sweep)
    measure = found.add_parser("measure", help="measure an ONNX file on a target")
    measure.add_argument("onnx", type=Path, nargs="?")
    measure.add_argument("--target", required=True)
    measure.add_argument("--against", type=Path, help="ONNX file to measure interleaved with")
    measure.add_argument("--batch", type=int, help="for a free first dimension (1)")
    measure.add_argument("--input-size", metavar="HxW", help="for free height and width")
    measure.add_argument("--probe-alignment", action="store_true", help="find the width step")
    measure.add_argument("--out", type=Path, help="folder for the staircase (the current one)")
    measure.add_argument("--no-cache", action="store_true", help="probe again, keep nothing")
    measure.add_argument("--json", action="store_true")
    build = found.add_parser("build", help="build an engine from an ONNX file")
    build.add_argument("onnx", type=Path)
    build.add_argument("--target", required=True)
    _precision_argument(build)
    build.add_argument("--data", help="calibration recipe, for int8 and fp16")
    build.add_argument("--out", type=Path, default=Path(), help="folder (the current one)")
    build.add_argument("--json", action="store_true")
    inspect = found.add_parser("inspect", help="axes, widths, what is frozen and why")
    _model_arguments(inspect)
    inspect.add_argument("--json", action="store_true")
    targets = found.add_parser("targets", help="every target profile: usable here?")
    targets.add_argument("--json", action="store_true")
    report = found.add_parser("report", help="render a run again, or compare runs")
    report.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    report.add_argument("--out", type=Path, help="folder for the page that compares runs")
    report.add_argument("--json", action="store_true")
    return top


def _first_line() -> str:
    return "Prune a PyTorch model until its measured latency on the target device meets a budget."


def _model_arguments(to: argparse.ArgumentParser) -> None:
    to.add_argument("--model", default="resnet50", help="resnet50, timm:NAME, yolov8n.yaml, ...")
    to.add_argument("--weights", type=Path, help="file with a state dict")
    to.add_argument("--batch", type=int, default=1)
    to.add_argument("--input-size", metavar="HxW", help="pixels; one number for a square")
    to.add_argument("--seed", type=int, default=0)
    to.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="a layer or pattern whose outputs keep all channels; may be repeated",
    )


def _precision_argument(to: argparse.ArgumentParser) -> None:
    to.add_argument("--precision", choices=config.PRECISIONS, help="the target's unless given")


def _output_arguments(to: argparse.ArgumentParser) -> None:
    to.add_argument("--out", type=Path, help="run directory (runs/MODEL-TARGET-... unless given)")
    to.add_argument("--resume", action="store_true", help="go on with a run that was stopped")
    to.add_argument("--json", action="store_true", help="one JSON document on standard output")


def _run_arguments(to: argparse.ArgumentParser) -> None:
    _model_arguments(to)
    _precision_argument(to)
    to.add_argument("--target", required=True, help="target profile (see: prune2deploy targets)")
    to.add_argument("--latency-ms", type=float, metavar="MS", help="the budget")
    to.add_argument("--speedup", type=float, metavar="S", help="the budget as a factor")
    to.add_argument("--percentile", type=int, default=50, help="that --latency-ms is for")
    to.add_argument("--data", help="calibration recipe")
    to.add_argument("--importance", default="l2", help="criterion that chooses channels")
    to.add_argument("--finetune", type=int, default=0, metavar="EPOCHS")
    to.add_argument(
        "--max-drop",
        type=float,
        metavar="FRACTION",
        help="top-1 accuracy that fp16 or int8 may cost; needs labelled data",
    )
    to.add_argument(
        "--max-builds",
        type=int,
        default=config.RunOptions.max_builds,
        metavar="N",
        help="besides the baseline",
    )
    to.add_argument("--max-size-mb", type=float, metavar="MB", help="cap on the weights' size")
    to.add_argument("--max-macs", type=float, metavar="N", help="cap on multiply-accumulates")
    to.add_argument(
        "--max-pruning-ratio", type=float, metavar="R", help="that any layer loses, 0 to 1"
    )
    to.add_argument("--no-cache", action="store_true", help="forget timings of earlier runs")
    _output_arguments(to)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; without a sub-command they are those of ``run``.

    Raises:
        ConfigError: They do not fit.
    """
    given = list(argv)
    if given and given[0] not in COMMANDS:
        if not given[0].startswith("-"):
            near = difflib.get_close_matches(given[0], COMMANDS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"no command {given[0]!r}; {hint}expected one of {', '.join(COMMANDS)}"
            )
        if given[0] not in ("-h", "--help", "--version"):
            given.insert(0, "run")
    return parser().parse_args(given or ["--help"])


def run(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    as_json = "--json" in argv
    with _standard_output(as_json) as out:
        try:
            return _answer(argv, out, as_json=as_json)
        except Prune2DeployError as error:
            return _complain(error, error.exit_code, out, as_json=as_json)
        except KeyboardInterrupt as error:
            return _complain(error, INTERRUPTED, out, as_json=as_json)
        except OSError as error:
            return _system(error, out, as_json=as_json)
        except Exception as error:  # noqa: BLE001  (the last place that can turn a bug into a report)
            return _bug(error, out, as_json=as_json)


def _system(error: OSError, out: Any, *, as_json: bool) -> int:
    """A full disk, a file that cannot be read or written, a reader that is gone (``| head``)."""
    if isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    if error.filename is None and error.errno not in DISK_FULL:
        return _bug(error, out, as_json=as_json)
    if error.errno in DISK_FULL:
        told = explain(error, Path(error.filename or Path.cwd()))
    else:
        told = ConfigError(
            f"{error.filename}: cannot be used ({error.strerror or error}); check that it is what "
            "you mean, and that you may read it, or write it if it is for results"
        )
    return _complain(told, told.exit_code, out, as_json=as_json)


def _answer(argv: Sequence[str], out: Any, *, as_json: bool) -> int:
    try:
        arguments = parse(argv)
    except SystemExit as leaving:  # argparse has printed help or the version
        return int(leaving.code or 0)
    from prune2deploy import commands, console

    with console.drawing() if sys.stderr.isatty() else nullcontext(console.logging(_log)) as drawn:
        reply = commands.TABLE[arguments.command](arguments, _telling(drawn))
    text = json.dumps(reply.document, allow_nan=False) if as_json else reply.text
    print(text, file=out, flush=True)
    return reply.exit_code


def _log(line: str) -> None:
    print(f"prune2deploy: {line}", file=sys.stderr, flush=True)


def _telling(drawn: Progress) -> Progress:
    """Print notices on standard error at once, on a terminal or not; the rest is drawn."""

    def hear(step: Step) -> None:
        if step.stage == NOTICE:
            _log(f"note: {step.detail}")
        else:
            drawn(step)

    return hear


def _complain(error: BaseException, code: int, out: Any, *, as_json: bool) -> int:
    told = str(error) or "interrupted"
    print(f"prune2deploy: {told}", file=sys.stderr)
    if as_json:
        document = {"error": type(error).__name__, "message": told, "exit_code": code}
        print(json.dumps(document), file=out, flush=True)
    return code


def _bug(error: Exception, out: Any, *, as_json: bool) -> int:
    traceback.print_exception(error, file=sys.stderr)
    told = RuntimeError(f"a bug of prune2deploy {__version__}, not of yours: {error!r}")
    return _complain(told, BUG, out, as_json=as_json)


@contextmanager
def _standard_output(as_json: bool) -> Iterator[Any]:
    """Give the stream for the answer; with ``as_json`` all other output goes to standard error.

    The file descriptor itself is moved, because libraries and child processes write to it too.
    """
    if not as_json:
        yield sys.stdout
        return
    sys.stdout.flush()
    kept = os.dup(1)
    stdout, sys.stdout = sys.stdout, sys.stderr
    os.dup2(2, 1)
    try:
        with os.fdopen(os.dup(kept), "w", encoding="utf-8") as out:
            yield out
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        sys.stdout = stdout
