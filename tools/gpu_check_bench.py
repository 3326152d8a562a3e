"""What the checks of ``gpu_checks`` share: a small net, its files, engines and sessions.

In: a folder and a target. Out: a :class:`Bench`. Files are made once and found again by name, since
each check is a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prune2deploy.backends import gpu_memory, registry
from prune2deploy.backends.base import Backend, Engine, Session
from prune2deploy.errors import BackendError
from prune2deploy.exporting import export, parity, precision, program, simplify
from prune2deploy.target import Target

SAMPLES = 50
SIZE = 128
ROWS = 8
Facts = dict[str, Any]


class Skip(Exception):  # noqa: N818 - an outcome, not an error
    """The check cannot be made here; the text says why."""


class Net(nn.Module):
    """A residual net that is large enough to time and small enough to build in seconds."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.ReLU())
        self.blocks = nn.ModuleList([nn.Conv2d(64, 64, 3, 1, 1) for _ in range(6)])
        self.head = nn.Linear(64, 100)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Classify images (N, 3, H, W) into (N, 100)."""
        x = self.stem(x)
        for block in self.blocks:
            x = torch.relu(x + 0.1 * block(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


def net() -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    """The net and an example, always the same."""
    torch.manual_seed(0)
    return Net().eval(), (torch.randn(1, 3, SIZE, SIZE),)


class Bench:
    """The files, the target and the backend that the checks share."""

    def __init__(self, folder: Path, target: Target) -> None:
        self.folder = folder
        self.target = target
        if target.backend == "tensorrt":
            self.target = self.with_options(cache=str(folder / "cache"))
        self.backend: Backend = registry.for_target(self.target)
        self.module, self.examples = net()

    def with_options(self, **changed: Any) -> Target:
        """The target with some options changed."""
        return replace(self.target, options=tuple({**dict(self.target.options), **changed}.items()))

    def onnx(self, kind: str) -> Path:
        """The net in one precision, made the first time that it is wanted."""
        path = self.folder / f"{kind}.onnx"
        if path.exists():
            return path
        if kind == "fp32":
            raw = export.to_onnx(self.module, self.examples, self.folder / "raw.onnx")
            return simplify.simplify(raw, path).path
        if kind == "fp16":
            return precision.to_fp16(self.onnx("fp32"), path).path
        if kind == "int8-fp16":
            return precision.to_fp16(self.onnx("int8"), path).path
        rows = [((torch.randn(1, 3, SIZE, SIZE),), None) for _ in range(ROWS)]
        options = precision.Int8Options(recipe=self.backend.int8_recipe(self.target))
        return precision.to_int8(self.onnx("fp32"), path, rows, options).path

    def build(self, kind: str, target: Target | None = None) -> Engine:
        """The engine of one precision."""
        onnx = self.onnx(kind)
        wanted = self.in_precision(kind, target)
        if self.backend.takes_program:
            program.save(self.module, self.examples, onnx.with_suffix(".pt2"), wanted.precision)
        return self.backend.build(onnx, wanted, self.folder / "out" / kind)

    def in_precision(self, kind: str, target: Target | None = None) -> Target:
        """The target in the precision that a file is in."""
        return replace(target or self.target, precision=kind.partition("-")[0])

    def open(self, engine: Engine, target: Target | None = None) -> Session:
        """Open an engine for running."""
        return self.backend.open(engine, target or self.target)

    def feeds(self, session: Session) -> Facts:
        """The example as the engine's input, in the engine's own types."""
        given = parity.as_sample(self.examples)
        return {spec.name: given[spec.name].astype(spec.dtype) for spec in session.inputs}


def raises(call: Callable[[], object]) -> str:
    """Return the message of the BackendError that ``call`` must raise."""
    try:
        call()
    except BackendError as error:
        return str(error)
    raise AssertionError("expected a BackendError, and there was none")


def installed(name: str) -> None:
    """Skip the check where a library for GPU memory is not installed."""
    if name not in gpu_memory.installed():
        raise Skip(f"{gpu_memory.PROVIDERS[name][0]} is not installed")
