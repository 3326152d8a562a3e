"""How to fine-tune: the settings of :mod:`prune2deploy.recover.finetune`, every one checked.

In: values of a caller. Out: :class:`FinetuneOptions`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from prune2deploy.config import MOST_SEED, at_least, is_number
from prune2deploy.errors import ConfigError

_Fits = Callable[[Any], bool]
_FRACTION: tuple[_Fits, str] = (lambda value: 0 <= value < 1, "0 up to but not including 1")
_POSITIVE: tuple[_Fits, str] = (lambda value: 0 < value < math.inf, "a finite number above 0")
_NUMBERS: Mapping[str, tuple[_Fits, str]] = {
    "lr": _POSITIVE,
    "momentum": _FRACTION,
    "weight_decay": (lambda value: 0 <= value < math.inf, "0 or more"),
    "temperature": _POSITIVE,
    "alpha": (lambda value: 0 <= value <= 1, "0 to 1"),
    "ema": _FRACTION,
    "warmup": _FRACTION,
    "clip": (lambda value: value > 0, "a number above 0"),
}


@dataclass(frozen=True)
class FinetuneOptions:
    """How to fine-tune.

    Attributes:
        epochs: Passes over the batches; 0 trains nothing.
        lr: Highest learning rate of SGD with Nesterov momentum; ``None`` is ``RATE``, and less
            by the square where there are fewer than ``SETTLES`` steps: what cannot settle is
            better hardly moved.
        momentum: Of SGD.
        weight_decay: On weights of two or more dimensions only.
        temperature: Softens both outputs before they are compared.
        alpha: Share of the teacher in the loss, 0..1; without labels it is 1.
        ema: Decay of the moving average of the weights per step, or 0 for none.
        warmup: Share of all steps over which the rate rises.
        clip: Largest norm of the gradient.
        amp: Mixed precision on a GPU (bfloat16 where the GPU has it, else float16 with scaling).
        device: Where to train; ``None`` takes a GPU if there is one.
        seed: For the order of the samples and for dropout.
    """

    epochs: int = 10
    lr: float | None = None
    momentum: float = 0.9
    weight_decay: float = 1e-4
    temperature: float = 2.0
    alpha: float = 0.5
    ema: float = 0.0
    warmup: float = 0.05
    clip: float = 5.0
    amp: bool = True
    device: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        at_least("fine-tuning: epochs", self.epochs, 0)
        at_least("fine-tuning: seed", self.seed, 0)
        if self.seed > MOST_SEED:
            raise ConfigError(f"fine-tuning: seed: found {self.seed}, expected at most {MOST_SEED}")
        for name, (fits, expected) in _NUMBERS.items():
            value = getattr(self, name)
            if name == "lr" and value is None:
                continue
            if not (is_number(value) and fits(value)):
                raise ConfigError(f"fine-tuning: {name}: found {value!r}, expected {expected}")

    def place(self) -> torch.device:
        """Return the device to train on.

        Raises:
            ConfigError: PyTorch cannot use it here.
        """
        name = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            return torch.empty(0, device=name).device
        except (RuntimeError, AssertionError, TypeError) as error:  # as torch was built
            raise ConfigError(
                f"fine-tuning: device: found {name!r}, expected cpu, or another one that PyTorch "
                f"can use here ({str(error).splitlines()[0]})"
            ) from error
