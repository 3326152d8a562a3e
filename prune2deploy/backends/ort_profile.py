"""Read ONNX Runtime's profile: events to operator timings with logical shapes.

In: the JSON that ``end_profiling`` names. Out: one ``OperatorTiming`` per operator of the optimised
graph. Blocked (NCHWc) kernels report channels rounded up to whole blocks, so their shapes are
looked up in the ONNX graph by the tensor that they are named after.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from prune2deploy.backends.onnx_file import Shapes, contraction
from prune2deploy.errors import BackendError
from prune2deploy.timing import OperatorTiming, Shape

_BLOCKED = "_nchwc"
_SUFFIX = "_kernel_time"
_COPIES = ("MemcpyFromHost", "MemcpyToHost")


@contextlib.contextmanager
def folder() -> Iterator[str]:
    """Give a file prefix in a temporary folder; ONNX Runtime appends a date to it."""
    with tempfile.TemporaryDirectory(prefix="prune2deploy-") as path:
        yield str(Path(path) / "profile")


def read(path: Path) -> list[dict[str, Any]]:
    """Return the events of operators, in order.

    Raises:
        BackendError: The file is not what this runtime is known to write.
    """
    try:
        events = json.loads(path.read_text(encoding="utf-8"))
        return [e for e in events if e["cat"] == "Node" and e["name"].endswith(_SUFFIX)]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BackendError(f"{path}: not an ONNX Runtime profile: {error!r}") from error


def elsewhere(events: Sequence[dict[str, Any]], provider: str) -> list[str]:
    """Name the operators that ran on another provider than ``provider``, sorted and once each."""
    return sorted(
        {
            f"{e['name'].removesuffix(_SUFFIX)} ({e['args']['op_name']})"
            for e in events
            if e["args"]["provider"] != provider and e["args"]["op_name"] not in _COPIES
        }
    )


def timings(events: Sequence[dict[str, Any]], shapes: Shapes) -> tuple[OperatorTiming, ...]:
    """Keep the minimum of each operator over the runs (contention only ever adds).

    Args:
        events: What ``read`` returned.
        shapes: Logical shapes of the ONNX file that the engine was built from.
    """
    least: dict[tuple[str, str], float] = {}
    first: dict[tuple[str, str], dict[str, Any]] = {}
    for event in events:
        key = (event["name"].removesuffix(_SUFFIX), str(event["args"]["node_index"]))
        ns = 1000.0 * float(event["dur"])  # whole microseconds
        least[key] = min(least.get(key, ns), ns)
        first.setdefault(key, event)
    names: dict[str, int] = {}
    found = []
    for key, event in first.items():
        repeat = names.get(key[0], 0)
        names[key[0]] = repeat + 1
        inputs, outputs = _shapes(key[0], event["args"], shapes)
        name = f"{key[0]}#{repeat}" if repeat else key[0]
        found.append(OperatorTiming(name, event["args"]["op_name"], inputs, outputs, least[key]))
    return tuple(found)


def _shapes(
    name: str, args: dict[str, Any], shapes: Shapes
) -> tuple[tuple[Shape, ...], tuple[Shape, ...]]:
    inputs, outputs = _reported(args["input_type_shape"]), _reported(args["output_type_shape"])
    tensor = name.removesuffix(_BLOCKED)
    if not name.endswith(_BLOCKED) or tensor not in shapes.shapes:
        return inputs, outputs
    output = shapes.shapes[tensor]
    node = contraction(shapes, tensor) if args["op_name"] == "Conv" else None
    node = node or shapes.producer.get(tensor)
    if node is None:
        return inputs, (output,)
    logical = tuple(shapes.shapes[i] for i in node.inputs if i in shapes.shapes)
    extra = tuple(
        output if len(shape) == len(output) else output[1:2] for shape in inputs[len(logical) :]
    )  # a bias or a residual that was fused into the convolution
    return logical + extra, (output,)


def _reported(entries: list[dict[str, list[int]]]) -> tuple[Shape, ...]:
    return tuple(tuple(dims) for entry in entries for dims in entry.values())
