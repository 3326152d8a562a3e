"""Time and memory of a model as PyTorch runs it, as ``tp.utils.benchmark``.

One model by itself, in this process: enough for a first look. ``prune2deploy.prune_to_budget`` and
``prune2deploy measure`` compare engines side by side and give intervals.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import ConfigError
from prune2deploy.graph.calling import Forward, device_of, run, tensors_in


@torch.no_grad()
def measure_latency(
    model: nn.Module,
    example_inputs: Any,
    repeat: int = 300,
    warmup: int = 50,
    run_fn: Forward | None = None,
) -> tuple[float, float]:
    """Wall milliseconds of a forward pass in evaluation mode: mean and standard deviation.

    Args:
        model: The model; evaluation mode stays on.
        example_inputs: One tensor, a tuple of arguments, or a dict of keywords.
        repeat: Passes to time, two at least.
        warmup: Passes before them.
        run_fn: ``run_fn(model, example_inputs)`` where calling the model takes more.
    """
    model.eval()
    device = device_of(model)
    for _ in range(warmup):
        run(model, example_inputs, run_fn)
    taken = []
    for _ in range(repeat):
        _wait(device)
        start = time.perf_counter()
        run(model, example_inputs, run_fn)
        _wait(device)
        taken.append(1e3 * (time.perf_counter() - start))
    return statistics.mean(taken), statistics.stdev(taken)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def measure_memory(
    model: nn.Module,
    example_inputs: Any,
    device: torch.device | str | int | None = None,
    run_fn: Forward | None = None,
) -> int:
    """Most bytes that a CUDA device has allocated during a forward pass, weights included.

    Raises:
        ConfigError: the model is on another kind of device.
    """
    at = device_of(model)
    if at.type != "cuda":
        raise ConfigError(
            f"measure_memory: found a model on {at}, expected one on a CUDA device; move model and "
            "inputs there"
        )
    counted = at if device is None else device
    torch.cuda.reset_peak_memory_stats(counted)
    model.eval()
    run(model, example_inputs, run_fn)
    return int(torch.cuda.max_memory_allocated(counted))


def measure_fps(
    model: nn.Module,
    example_inputs: Any,
    repeat: int = 300,
    warmup: int = 50,
    run_fn: Forward | None = None,
) -> float:
    """Forward passes in a second, one after the other."""
    return 1e3 / measure_latency(model, example_inputs, repeat, warmup, run_fn)[0]


def measure_throughput(
    model: nn.Module,
    example_inputs: Any,
    repeat: int = 300,
    warmup: int = 50,
    run_fn: Forward | None = None,
) -> float:
    """Samples in a second: the first dimension of the first input counts them."""
    batch = next(tensors_in(example_inputs)).shape[0]
    return batch * measure_fps(model, example_inputs, repeat, warmup, run_fn)
