"""The arguments of every command: their declaration, their parsing, and errors about wrong ones.

In: ``argv``. Out: a namespace with a value for every option of the command. Nothing here imports a
library, so that ``--help`` needs none. Which values fit together is the business of ``config``.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, TypeVar

from prune2deploy import __version__, config
from prune2deploy.errors import ConfigError
from prune2deploy.target import PRECISIONS

T = TypeVar("T")

PURPOSE = """Prune a PyTorch model until its measured latency on the target device meets a budget.

  prune2deploy --model resnet18 --target ort --speedup 1.5

is short for `prune2deploy run ...`."""
EXIT_CODES = """exit codes: 0 budget met, 2 wrong usage or input, 3 target or dependency not
available, 4 budget unreachable, 5 parity failed, 6 measurement too unstable to decide,
130 interrupted, 143 terminated, 1 a bug of this program"""

_OURS = {  # how argparse says it, and how this package does
    "expected one argument": "found nothing after it, expected a value",
    "the following arguments are required:": "found too few arguments, expected also",
}


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are errors of this package, and that takes options in full."""

    def __init__(self, **settings: Any) -> None:
        form = argparse.RawDescriptionHelpFormatter
        super().__init__(allow_abbrev=False, formatter_class=form, **settings)

    def error(self, message: str) -> NoReturn:
        """Raise ConfigError that says where the options are described."""
        said = message.removeprefix("argument ")
        for theirs, ours in _OURS.items():
            said = said.replace(theirs, ours)
        raise ConfigError(f"{said}; `{self.prog} --help` describes every option")

    def check(self, words: Sequence[str]) -> None:
        """Raise ConfigError at the first of ``words`` that looks like an option and is none."""
        known = self._option_string_actions
        for word in itertools.takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if word[:1] != "-" or word == "-" or " " in word or _is_number(word) or name in known:
                continue
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
            hint = f"did you mean {near[0]}? " if near else ""
            raise ConfigError(
                f"found {name}, which is no option of `{self.prog}`; {hint}"
                f"`{self.prog} --help` lists them"
            )


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def number(text: str) -> float:
    """Read a number; which ones fit is checked with the other options."""
    return _read(float, text, "a number such as 2 or 0.5")


def whole(text: str) -> int:
    """Read a whole number."""
    return _read(int, text, "a whole number")


def _read(kind: Callable[[str], T], text: str, expected: str) -> T:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"found {text!r}, expected {expected}") from None


def path(text: str) -> Path:
    """Read a path; an empty one (of a shell variable that is not set) is not the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError("found an empty path, expected that of a file or folder")
    return Path(text)


def _model(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("the model")
    group.add_argument(
        "--model",
        default="resnet50",
        metavar="NAME",
        help="resnet50 (torchvision), timm:NAME, yolov8n.yaml or best.pt (ultralytics), hf:FOLDER, "
        "FILE.pt2, or yours as FILE.py:FACTORY or PACKAGE.MODULE:FACTORY (default: resnet50)",
    )
    group.add_argument(
        "--weights", type=path, metavar="FILE", help="state dict (torch.save or safetensors)"
    )
    group.add_argument(
        "--batch", type=whole, default=1, metavar="N", help="samples per inference (default: 1)"
    )
    group.add_argument(
        "--input-size",
        metavar="HxW",
        help="input height and width in pixels; one number for a square (default: the model's)",
    )
    group.add_argument(
        "--seed", type=whole, default=0, metavar="N", help="seed of all random values (default: 0)"
    )
    group.add_argument(
        "--keep",
        action="append",
        default=[],
        metavar="LAYER",
        help="name or pattern ('layer1*') of layers that keep all channels; may be repeated",
    )
    group.add_argument(
        "--keep-class", action="store_true", help="leave widths that the model's code cannot follow"
    )


def _target(to: argparse.ArgumentParser) -> None:
    to.add_argument_group("the target").add_argument(
        "--target",
        required=True,
        metavar="NAME",
        help="one of `prune2deploy targets`, or the path of your own TOML file",
    )


def _precision(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "--precision",
        type=partial(config.one_of, "--precision", choices=PRECISIONS),
        metavar="|".join(PRECISIONS),
        help="number format of weights and arithmetic (default: the target's)",
    )


def _data(to: Any, uses: str) -> None:
    to.add_argument("--data", metavar="RECIPE", help=f"TOML file that describes data; {uses}")


def _importance(to: Any) -> None:
    default = config.RunOptions.importance
    to.add_argument(
        "--importance",
        default=default,
        metavar="NAME",
        help="what a channel is worth: l1, l2, group_norm, bn_scale, fpgm, lamp, random; with "
        f"--data also taylor, fisher, hessian, activation (default: {default})",
    )


def _results(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("results")
    group.add_argument(
        "--out", type=path, metavar="FOLDER", help="where to write (default: a new one in runs/)"
    )
    group.add_argument(
        "--resume", action="store_true", help="continue a run of this command that was interrupted"
    )


def _budget(to: argparse.ArgumentParser) -> None:
    budget = to.add_argument_group("the budget: one of the first two")
    budget.add_argument(
        "--latency-ms",
        type=number,
        metavar="MS",
        help="greatest latency of one inference, in milliseconds",
    )
    budget.add_argument(
        "--speedup", type=number, metavar="S", help="times as fast as the unpruned model"
    )
    budget.add_argument(
        "--percentile",
        type=whole,
        default=50,
        metavar="P",
        help="percentile of the latency that has to meet --latency-ms: 50, 95 or 99 (default: 50)",
    )


def _run(to: argparse.ArgumentParser) -> None:
    _target(to)
    _budget(to)
    _model(to)
    _caps(to)
    accuracy = to.add_argument_group("accuracy")
    _data(accuracy, "without data a pruned model needs training")
    accuracy.add_argument(
        "--finetune", type=whole, default=0, metavar="EPOCHS", help="train a classifier on --data"
    )
    _importance(accuracy)
    _precision(to)
    accuracy.add_argument(
        "--max-drop",
        type=number,
        metavar="FRACTION",
        help="largest top-1 accuracy that fp16 or int8 may cost, 0.01 for one point; needs labels",
    )
    search = to.add_argument_group("the search")
    search.add_argument(
        "--max-builds",
        type=whole,
        default=config.RunOptions.max_builds,
        metavar="N",
        help="most engines to build besides the baseline (default: %(default)s)",
    )
    search.add_argument(
        "--no-cache", action="store_true", help="neither use nor keep timings of other runs"
    )
    _results(to)


def _caps(to: argparse.ArgumentParser) -> None:
    group = to.add_argument_group("further limits")
    group.add_argument(
        "--max-size-mb", type=number, metavar="MB", help="greatest size of all weights"
    )
    group.add_argument(
        "--max-macs",
        type=number,
        metavar="N",
        help="most multiply-accumulates of one inference, as 1.5e9",
    )
    group.add_argument(
        "--max-pruning-ratio",
        type=number,
        metavar="R",
        help="largest fraction of its channels that a layer may lose; no block is taken out",
    )


def _sweep(to: argparse.ArgumentParser) -> None:
    _target(to)
    to.add_argument(
        "--ratios",
        default="0:0.9:0.1",
        metavar="LIST",
        help="of channels to remove, as START:STOP:STEP or 0.25,0.5 (default: 0:0.9:0.1)",
    )
    _model(to)
    _importance(to)
    _precision(to)
    _data(to, "for int8, and for criteria that need data")
    _results(to)


def _measure(to: argparse.ArgumentParser) -> None:
    to.add_argument("onnx", type=path, nargs="?", metavar="FILE.onnx", help="what to measure")
    _target(to)
    to.add_argument(
        "--against", type=path, metavar="OTHER.onnx", help="measure both in turn, for their ratio"
    )
    to.add_argument(
        "--batch",
        type=whole,
        metavar="N",
        help="batch size if the file leaves it open (default: 1)",
    )
    to.add_argument(
        "--input-size", metavar="HxW", help="height and width, where the file leaves them open"
    )
    probe = to.add_argument_group("instead of a file")
    probe.add_argument(
        "--probe-alignment",
        action="store_true",
        help="find the channel multiple that the device runs well at",
    )
    probe.add_argument(
        "--out", type=path, metavar="FOLDER", help="where picture and JSON go (default: .)"
    )
    probe.add_argument("--no-cache", action="store_true", help="probe again, and keep nothing")


def _build(to: argparse.ArgumentParser) -> None:
    to.add_argument("onnx", type=path, metavar="FILE.onnx", help="what to build the engine from")
    _target(to)
    _precision(to)
    _data(to, "for int8 and fp16")
    to.add_argument(
        "--out", type=path, default=Path(), metavar="FOLDER", help="where to write (default: .)"
    )


def _report(to: argparse.ArgumentParser) -> None:
    to.add_argument(
        "runs",
        type=path,
        nargs="+",
        metavar="RUN_DIR",
        help="one run to render again, more to compare",
    )
    to.add_argument("--out", type=path, metavar="FOLDER", help="where the page that compares goes")


class Command(NamedTuple):
    """One command: how its arguments are declared, what it does, and lines that show its use."""

    declare: Callable[[argparse.ArgumentParser], None]
    purpose: str
    examples: tuple[str, ...]


COMMANDS = {
    "run": Command(
        _run,
        "prune until the latency budget is met",
        (
            "--model resnet50 --target ort --speedup 2",
            "--model net.py:make --weights net.pth --target ./board.toml --latency-ms 20 \\\n"
            "                   --data pictures.toml --finetune 20",
        ),
    ),
    "sweep": Command(
        _sweep,
        "measure latency against the pruning ratio",
        ("--model resnet50 --target ort --ratios 0:0.9:0.1",),
    ),
    "measure": Command(
        _measure,
        "measure an ONNX file on a target",
        (
            "model.onnx --target ort",
            "model.onnx --target ort --against other.onnx",
            "--probe-alignment --target ort",
        ),
    ),
    "build": Command(
        _build, "build an engine from an ONNX file", ("model.onnx --target trt-rtx --out engines",)
    ),
    "inspect": Command(
        _model, "show axes and widths, and what is frozen and why", ("--model vit_b_32",)
    ),
    "targets": Command(
        lambda to: None, "list every target: is it usable here, and if not, why", ("",)
    ),
    "report": Command(
        _report, "render a run again, or compare runs", ("runs/a", "runs/a runs/b --out page")
    ),
}


def parser() -> tuple[Parser, dict[str, Parser]]:
    """The whole command line, and the part of each command."""
    top = Parser(prog="prune2deploy", description=PURPOSE, epilog=EXIT_CODES)
    top.add_argument("--version", action="version", version=f"prune2deploy {__version__}")
    found = top.add_subparsers(dest="command", metavar="COMMAND", parser_class=Parser)
    parts = {}
    for name, (declare, purpose, examples) in COMMANDS.items():
        shown = "\n".join(f"  prune2deploy {name} {one}".rstrip() for one in examples)
        epilog = f"examples:\n{shown}"
        part = found.add_parser(
            name, help=purpose, description=f"{purpose[0].upper()}{purpose[1:]}.", epilog=epilog
        )
        declare(part)
        part.add_argument(
            "--json", action="store_true", help="one JSON document on standard output"
        )
        parts[name] = part
    return top, parts


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the arguments; without a sub-command they are those of ``run``.

    Raises:
        ConfigError: They do not fit.
    """
    given = list(argv)
    top, parts = parser()
    if not given or given[0] in ("-h", "--help", "--version"):
        return top.parse_args(given or ["--help"])
    if given[0].startswith("-"):
        given.insert(0, "run")
    if given[0] not in COMMANDS:
        near = difflib.get_close_matches(given[0], COMMANDS, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"no command {given[0]!r}; {hint}expected one of {', '.join(COMMANDS)}")
    part = parts[given[0]]
    part.check(given[1:])
    found, more = top.parse_known_args(given)
    if more:
        part.error(f"found {more[0]!r}, expected nothing beside the options")
    return found
