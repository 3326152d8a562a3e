"""Time every node of an exported program as it runs eagerly.

In: a graph module and its inputs. Out: one ``OperatorTiming`` per operator call, the minimum over
the runs.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from prune2deploy.timing import OperatorTiming, Shape


class _Timer(torch.fx.Interpreter):
    """Runs a graph node by node and notes times and shapes."""

    def __init__(self, module: torch.fx.GraphModule, synchronize: bool) -> None:
        super().__init__(module)
        self.least: dict[str, float] = {}
        self.facts: dict[str, tuple[str, tuple[Shape, ...], tuple[Shape, ...]]] = {}
        self._synchronize = synchronize

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        started = time.perf_counter_ns()
        result = super().run_node(n)
        if self._synchronize:
            torch.cuda.synchronize()
        ns = float(time.perf_counter_ns() - started)
        if n.name not in self.least:
            self.facts[n.name] = (_kind(n), _shapes((args, kwargs)), _shapes(result))
        self.least[n.name] = min(self.least.get(n.name, ns), ns)
        return result


def node_times(
    module: torch.fx.GraphModule, inputs: tuple[Any, ...], runs: int, device: str
) -> tuple[OperatorTiming, ...]:
    """Return the timing of each operator call of ``module`` on ``inputs``."""
    timer = _Timer(module, device.startswith("cuda"))
    for _ in range(runs + 3):
        timer.run(*inputs)
    return tuple(OperatorTiming(name, *timer.facts[name], ns) for name, ns in timer.least.items())


def _kind(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _shapes(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(v.shape) for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor))
