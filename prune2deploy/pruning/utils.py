"""Utilities, as ``tp.utils``: counting, timing, printing."""

from __future__ import annotations

from prune2deploy.pruning import benchmark, print_tool
from prune2deploy.pruning import counting as op_counter
from prune2deploy.pruning.counting import count_ops_and_params, count_params, flatten_as_list
from prune2deploy.pruning.ops import TORCH_BATCHNORM, TORCH_CONV, TORCH_LINEAR, TORCH_PRELU

__all__ = [
    "TORCH_BATCHNORM",
    "TORCH_CONV",
    "TORCH_LINEAR",
    "TORCH_PRELU",
    "benchmark",
    "count_ops_and_params",
    "count_params",
    "flatten_as_list",
    "op_counter",
    "print_tool",
]
