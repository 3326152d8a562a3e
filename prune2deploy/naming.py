"""Turns names of the command line in messages into those of Python.

Messages of all stages name options as they are typed on the command line (``--max-drop``). A caller
of the Python interface gave ``max_drop`` instead: :func:`in_python` stands around the functions of
that interface and rewrites the messages of their errors. No other place knows both names.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator

from prune2deploy.errors import Prune2DeployError

_OTHERS = {  # names that differ by more than dashes
    "latency-ms": "budget_ms",
    "data": "batches",
    "out": "run_dir",
    "no-cache": "cache=False",
    "resume": "resume=True",
}
_ALIKE = (
    "speedup", "percentile", "finetune", "precision", "importance", "keep", "keep-class", "seed",
    "max-drop", "max-builds", "max-size-mb", "max-macs", "max-pruning-ratio",
)  # fmt: skip
_NAMES = {**{name: name.replace("-", "_") for name in _ALIKE}, **_OTHERS}
_INSPECT = ("`prune2deploy inspect` lists", "`prune2deploy.trace(...).axes` lists")
_OPTION = re.compile(rf"--({'|'.join(_NAMES)})(?![\w-])( [A-Z]+\b)?")  # and its placeholder


def spelled(text: str) -> str:
    """A message with its options named as parameters, and its command as a function, of Python.

    >>> spelled("--max-drop needs labelled data: add --data RECIPE")
    'max_drop needs labelled data: add batches=...'
    """
    text = text.replace(*_INSPECT)
    return _OPTION.sub(lambda found: _NAMES[found[1]] + ("=..." if found[2] else ""), text)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Rewrite errors that leave the block so that they name parameters."""
    try:
        yield
    except Prune2DeployError as error:
        error.args = tuple(spelled(one) if isinstance(one, str) else one for one in error.args)
        raise
