"""Puts a model into training or evaluation mode, and gives every part its own flag back.

A program of ``torch.export`` has the mode that it was exported in written into its operators, and
its ``train`` and ``eval`` do nothing but raise. Wherever such a program stands in a model, only
the flags of its parts are set here, and its operators stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.export import ExportedProgram


def set_training(model: nn.Module, training: bool) -> None:
    """Put every part of ``model`` into training or evaluation mode."""
    refusing = [(part, _refusals(part)) for part in model.modules()]
    try:
        for part, methods in refusing:
            _drop(part, methods)
        model.train(training)
    finally:
        for part, methods in refusing:
            vars(part).update(methods)


def let_switch(model: nn.Module) -> None:
    """Have ``model`` take ``train`` and ``eval``, whatever it is made of; it is changed."""
    for part in model.modules():
        _drop(part, _refusals(part))


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every part gets its own flag back on leaving."""
    flags = [(part, part.training) for part in model.modules()]
    set_training(model, False)
    try:
        yield
    finally:
        for part, flag in flags:
            part.training = flag


def _refusals(part: nn.Module) -> dict[str, Any]:
    """The methods of one part that do nothing but raise, by name."""
    own = {name: vars(part)[name] for name in ("train", "eval") if name in vars(part)}
    home = ExportedProgram.__module__
    return {name: method for name, method in own.items() if method.__module__ == home}


def _drop(part: nn.Module, methods: dict[str, Any]) -> None:
    for name in methods:
        del vars(part)[name]
