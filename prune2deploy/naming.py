"""Options by their names in Python, in messages that name them as the command line does.

Every stage names an option as it is typed, ``--max-drop``, because most of its callers typed it.
Whoever calls a function gave ``max_drop``: :func:`in_python` stands around the functions of the
Python interface, and is the only place that knows both names.
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
    "speedup", "percentile", "finetune", "precision", "importance", "keep", "seed", "max-drop",
    "max-builds", "max-size-mb", "max-macs", "max-pruning-ratio",
)  # fmt: skip
_NAMES = {**{name: name.replace("-", "_") for name in _ALIKE}, **_OTHERS}
_OPTION = re.compile(
    rf"--({'|'.join(_NAMES)})(?![\w-])( [A-Z]+\b)?"
)  # with what stands for a value


def spelled(text: str) -> str:
    """A message with its options named as the parameters of Python functions.

    >>> spelled("--max-drop needs labelled data: add --data RECIPE")
    'max_drop needs labelled data: add batches=...'
    """
    return _OPTION.sub(lambda found: _NAMES[found[1]] + ("=..." if found[2] else ""), text)


@contextlib.contextmanager
def in_python() -> Iterator[None]:
    """Have errors that leave the block name parameters."""
    try:
        yield
    except Prune2DeployError as error:
        error.args = tuple(spelled(one) if isinstance(one, str) else one for one in error.args)
        raise
