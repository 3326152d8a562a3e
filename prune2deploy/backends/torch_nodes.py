"""Time every node of an exported program as it runs eagerly.

In: a graph module and its inputs. Out: one ``OperatorTiming`` per operator call, the minimum over
the runs. On a GPU every call lies between two events, and the device is held up until the run is
queued: else it would be waiting for launches, which take longer than many kernels.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils import _pytree as pytree

from prune2deploy.timing import OperatorTiming, Shape
from prune2deploy.units import NS_PER_MS

_WARM_RUNS = 3
_CYCLES_PER_NS = 3  # more than any GPU's clock has
_MOST_NS = 50_000_000  # to hold a device up for: others may be waiting for it


class _Timer(torch.fx.Interpreter):
    """Runs a graph node by node and notes times and shapes."""

    def __init__(self, module: torch.fx.GraphModule, on_gpu: bool) -> None:
        super().__init__(module)
        self.least: dict[str, float] = {}
        self.facts: dict[str, tuple[str, tuple[Shape, ...], tuple[Shape, ...]]] = {}
        self.on_gpu = on_gpu
        self._spans: dict[str, tuple[Any, Any]] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        first = self._now()
        result = super().run_node(n)
        self._spans[n.name] = first, self._now()
        if n.name not in self.facts:
            self.facts[n.name] = (_kind(n), _shapes((args, kwargs)), _shapes(result))
        return result

    def _now(self) -> Any:
        """A point in time: of the device, once it gets there, or of this process."""
        if not self.on_gpu:
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def note(self) -> None:
        """Take the times of the run that has just been made."""
        if self.on_gpu:
            torch.cuda.synchronize()
        for name, (first, last) in self._spans.items():
            ns = first.elapsed_time(last) * NS_PER_MS if self.on_gpu else float(last - first)
            self.least[name] = min(self.least.get(name, ns), ns)


def node_times(
    module: torch.fx.GraphModule, inputs: tuple[Any, ...], runs: int, device: str
) -> tuple[OperatorTiming, ...]:
    """Return the timing of each operator call of ``module`` on ``inputs``."""
    timer = _Timer(module, device.startswith("cuda"))
    queueing_ns = _MOST_NS
    for _ in range(_WARM_RUNS):
        queueing_ns = min(queueing_ns, _run(timer, inputs))
    for _ in range(runs):
        if timer.on_gpu:
            torch.cuda._sleep(_CYCLES_PER_NS * queueing_ns)
        _run(timer, inputs)
    return tuple(OperatorTiming(name, *timer.facts[name], ns) for name, ns in timer.least.items())


def _run(timer: _Timer, inputs: tuple[Any, ...]) -> int:
    """Run and note once; the nanoseconds until all was queued.

    Is worth asking of runs on an idle device only: a queue takes about a thousand launches, and
    whoever has more to launch waits for the device.
    """
    started = time.perf_counter_ns()
    timer.run(*inputs)
    queueing_ns = time.perf_counter_ns() - started
    timer.note()
    return queueing_ns


def _kind(node: torch.fx.Node) -> str:
    return str(getattr(node.target, "__name__", node.target)).split(".")[0]


def _shapes(values: Any) -> tuple[Shape, ...]:
    return tuple(tuple(v.shape) for v in pytree.tree_leaves(values) if isinstance(v, torch.Tensor))
