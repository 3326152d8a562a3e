"""Show what pruning changed: the model's text before and after, line by line."""

from __future__ import annotations

import sys
from weakref import WeakKeyDictionary

from torch import nn

_before: WeakKeyDictionary[nn.Module, list[str]] = WeakKeyDictionary()


def before_pruning(model: nn.Module) -> None:
    """Remember how the model looks now."""
    _before[model] = str(model).splitlines()


def difference(model: nn.Module) -> str:
    """The model's text, with ``old => new`` on every line that changed since."""
    now = str(model).splitlines()
    then = _before.get(model, now)
    if len(then) != len(now):
        return "\n".join(now)
    lines = (
        new if old == new else f"{old} => {new.strip()}" for old, new in zip(then, now, strict=True)
    )
    return "\n".join(lines)


def after_pruning(model: nn.Module, do_print: bool = True) -> str:
    """Write ``difference`` to the standard output, as the name promises; returns it too."""
    text = difference(model)
    if do_print:
        sys.stdout.write(text + "\n")
    return text
