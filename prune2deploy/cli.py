"""The command line: arguments in, one table or one JSON document out, an exit code.

In: ``argv``. Out: text on standard output (with ``--json`` exactly one JSON document there and
everything else on standard error). What each sub-command does is in ``commands``, imported only
once the arguments are known, so that ``--help`` needs no library. This module alone prints.
"""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from prune2deploy import __version__
from prune2deploy.arguments import parse
from prune2deploy.errors import ConfigError, Prune2DeployError
from prune2deploy.progress import NOTICE, Progress, Step
from prune2deploy.rundir import DISK_FULL, explain

BUG, INTERRUPTED, TERMINATED = 1, 128 + signal.SIGINT, 128 + signal.SIGTERM
_NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")  # words of torch


class Terminated(KeyboardInterrupt):
    """SIGTERM, which schedulers and containers send; it ends a command as Ctrl-C does."""


def end_on_sigterm() -> None:
    """Have SIGTERM raise :class:`Terminated`, so that it is told and what was begun is cleared."""

    def terminate(*_: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)


def run(argv: Sequence[str]) -> int:
    """Run the command line; returns the exit code."""
    as_json = "--json" in argv
    _open_streams()
    with _standard_output(as_json) as out:
        try:
            return _answer(argv, out, as_json=as_json)
        except Prune2DeployError as error:
            return _complain(error, error.exit_code, out, as_json=as_json)
        except KeyboardInterrupt as error:
            code = TERMINATED if isinstance(error, Terminated) else INTERRUPTED
            return _complain(error, code, out, as_json=as_json)
        except OSError as error:
            return _system(error, out, as_json=as_json)
        except Exception as error:  # noqa: BLE001  (the last place that can turn a bug into a report)
            return _bug(error, out, as_json=as_json)


def _open_streams() -> None:
    """Replace streams that are closed, and let standard output escape what it cannot encode."""
    sys.stdout = sys.stdout or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    sys.stderr = sys.stderr or os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def _system(error: OSError, out: Any, *, as_json: bool) -> int:
    """Report what the system refused: a full disk, a file, a closed pipe (``| head``)."""
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
        with suppress(OSError):  # what went wrong may be that nothing can be written there
            print(json.dumps(document), file=out, flush=True)
    return code


def _bug(error: Exception, out: Any, *, as_json: bool) -> int:
    """Report a bug of this package with its traceback; memory that ran out is no bug."""
    if isinstance(error, MemoryError) or any(words in str(error) for words in _NO_MEMORY):
        detail = f" ({str(error).splitlines()[0]})" if str(error) else ""
        told = ConfigError(
            f"memory ran out{detail}; use a smaller --batch, --input-size or model, or free some"
        )
        return _complain(told, told.exit_code, out, as_json=as_json)
    traceback.print_exception(error, file=sys.stderr)
    bug = RuntimeError(f"a bug of prune2deploy {__version__}, not of yours: {error!r}")
    return _complain(bug, BUG, out, as_json=as_json)


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
    out = os.fdopen(os.dup(kept), "w", encoding="utf-8")
    try:
        yield out
    finally:
        with suppress(OSError):  # whatever is left in it could not be written before either
            out.close()
        os.dup2(kept, 1)
        os.close(kept)
        sys.stdout = stdout
