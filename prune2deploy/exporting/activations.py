"""What flows inside an ONNX file: the magnitude of every tensor, and where two files part.

In: an ONNX file and samples. Out: plain numbers per tensor. The file is run with ONNX Runtime
with inner tensors added to its outputs; only one sample's activations are held at a time.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from prune2deploy.errors import ExportError
from prune2deploy.exporting import companions
from prune2deploy.exporting.export import SINGLE_FILE_BYTES
from prune2deploy.exporting.parity import Array, Runner, onnx_runner, rms

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)
IS_INF_OPSET = 10  # the first that has the operator


def load_named(path: Path) -> Any:
    """Load a model with inner types inferred, constants stored as weights, every node named.

    Raises:
        ExportError: It is too large for that, or its weights cannot be read.
    """
    size = companions.size(path)
    if size > SINGLE_FILE_BYTES:
        raise ExportError(
            f"{path}: found {size / 1e9:.1f} GB with its weights, expected at most "
            f"{SINGLE_FILE_BYTES / 1e9:.1f} GB to convert to another precision; build it in fp32, "
            "or convert it with the runtime's own tools and give that file"
        )
    try:
        loaded = onnx.load(str(path))
    except ValueError as error:
        raise ExportError(
            f"{path}: its weights cannot be read: {error}; copy them again"
        ) from error
    model = onnx.shape_inference.infer_shapes(loaded, data_prop=True)
    constants_as_initializers(model.graph)
    _outputs_by_nodes(model.graph)
    seen: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{i}"
        seen.add(node.name)
    return model


def sort_nodes(graph: Any) -> None:
    """Put every node behind those that it needs, and otherwise leave the order as it is."""
    made = {output for node in graph.node for output in node.output}
    ready: set[str] = {""}
    waiting, ordered = list(graph.node), []
    while waiting:
        later = []
        for node in waiting:
            if all(name in ready or name not in made for name in needs(node)):
                ordered.append(node)
                ready.update(node.output)
            else:
                later.append(node)
        assert len(later) < len(waiting), "the graph has a cycle"
        waiting = later
    copies = [onnx.NodeProto.FromString(node.SerializeToString()) for node in ordered]
    del graph.node[:]
    graph.node.extend(copies)


def needs(node: Any) -> set[str]:
    """Names that a node reads, those read inside its branches and loops included."""
    found = set(node.input)
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.GRAPH:
            for inner in attribute.g.node:
                found |= needs(inner)
    return found


def constants_as_initializers(graph: Any) -> None:
    """Store the values of Constant nodes beside the weights, where every tool finds them."""
    for node in [n for n in graph.node if n.op_type == "Constant"]:
        value = next((a.t for a in node.attribute if a.name == "value"), None)
        if value is not None:
            value.name = node.output[0]
            graph.initializer.append(value)
            graph.node.remove(node)


def _outputs_by_nodes(graph: Any) -> None:
    """Have a node make each output that is a stored tensor: converters follow nodes."""
    wanted = {output.name for output in graph.output}
    names = {t.name: f"{t.name}/stored" for t in graph.initializer if t.name in wanted}
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = names.get(name, name)
    for made, stored in names.items():
        graph.node.insert(0, helper.make_node("Identity", [stored], [made]))


def float_tensors(model: Any) -> tuple[str, ...]:
    """Names of the floating-point inputs and inner tensors of a model, in order of execution.

    A tensor whose type is not known is left out; constants are no activations.
    """
    graph = model.graph
    stored = {t.name for t in graph.initializer}
    values = (*graph.input, *graph.value_info, *graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type in FLOATS} - stored
    made = [o for n in graph.node if n.op_type != "Constant" for o in n.output]
    names = dict.fromkeys([*(v.name for v in graph.input), *made])
    return tuple(name for name in names if name in floats)


@contextmanager
def opened(model: Any) -> Iterator[Runner]:
    """Run a model that is in memory; large ones go through a file that is removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="p2d-") as folder:
        path = Path(folder) / "model.onnx"
        external = model.ByteSize() > SINGLE_FILE_BYTES
        onnx.save_model(model, str(path), save_as_external_data=external)
        yield onnx_runner(path)


def with_outputs(model: Any, names: Sequence[str]) -> Any:
    """Copy ``model`` with the tensors ``names`` as its only outputs."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    known = {v.name: v for v in values}
    del copy.graph.output[:]
    copy.graph.output.extend(known[name] for name in names)
    return copy


def with_extremes(model: Any, names: Sequence[str], *, finite: bool = False) -> Any:
    """Copy ``model`` so that it gives the least and largest value of each tensor of ``names``.

    Outputs are ``NAME/min`` and ``NAME/max``, scalars: however large the tensors are, they are
    reduced inside the graph and nothing of them is kept. Where ``finite`` is asked for, infinite
    values of float32 count as zero, if the file's operator set can tell them.
    """
    copy = with_outputs(model, [])
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    kinds = {v.name: v.type.tensor_type.elem_type for v in values}
    opset = max(one.version for one in model.opset_import if one.domain in ("", "ai.onnx"))
    for name in names:
        masked = finite and kinds[name] == TensorProto.FLOAT and opset >= IS_INF_OPSET
        source = _finite(copy.graph, name) if masked else name
        for suffix, reduction in (("min", "ReduceMin"), ("max", "ReduceMax")):
            output = f"{name}/{suffix}"
            copy.graph.node.append(helper.make_node(reduction, [source], [output], keepdims=0))
            copy.graph.output.append(helper.make_tensor_value_info(output, kinds[name], []))
    return copy


def _finite(graph: Any, name: str) -> str:
    """Add a float32 tensor that has zeros where ``name`` is infinite; return its name."""
    zero, infinite, masked = (f"{name}/{part}" for part in ("zero", "infinite", "finite"))
    graph.initializer.append(helper.make_tensor(zero, TensorProto.FLOAT, [], [0.0]))
    graph.node.append(helper.make_node("IsInf", [name], [infinite]))
    graph.node.append(helper.make_node("Where", [infinite, zero, name], [masked]))
    return masked


def extremes(
    path: Path, samples: Iterable[Mapping[str, Array]], *, finite: bool = False
) -> dict[str, tuple[float, float]]:
    """Least and largest value of every floating-point tensor over all samples.

    Args:
        path: The ONNX file.
        samples: Inputs by name.
        finite: Have infinite values, such as those that mask attention, count as zero.

    Raises:
        ExportError: There is no such tensor.
    """
    model = load_named(path)
    names = float_tensors(model)
    if not names:
        raise ExportError(
            f"{path}: found no tensor of fp32 to convert to another precision; export it in fp32"
        )
    found = dict.fromkeys(names, (np.inf, -np.inf))
    with opened(with_extremes(model, names, finite=finite)) as run:
        for feeds in samples:
            values = run(feeds)
            for name, (low, high) in found.items():
                least, most = float(values[f"{name}/min"]), float(values[f"{name}/max"])
                found[name] = (min(low, least), max(high, most))
    return found


def error_jumps(
    reference: Path, candidate: Path, samples: Iterable[Mapping[str, Array]]
) -> dict[str, float]:
    """By how much each node of ``reference`` raises the error of ``candidate``.

    The error of a tensor is the root mean square of its difference over that of its reference
    values (infinite where only one of them is finite). A node's jump is the error of its worst
    output less that of its worst input, averaged over the samples: a node that only passes on
    what came in has none.

    Returns:
        Node name to its jump, largest first; nodes without a tensor in both files are left out.
    """
    first, second = load_named(reference), load_named(candidate)
    common = [n for n in float_tensors(first) if n in set(float_tensors(second))]
    total = dict.fromkeys(common, 0.0)
    with opened(with_outputs(first, common)) as a, opened(with_outputs(second, common)) as b:
        for feeds in samples:
            expected, found = a(feeds), b(feeds)
            for name in common:
                total[name] += rms(expected[name], found[name])
    jumps = {}
    for node in first.graph.node:
        outputs = [total[o] for o in node.output if o in total]
        inputs = [total[i] for i in node.input if i in total]
        if outputs:
            before = max(inputs, default=0.0)
            jumps[node.name] = max(outputs) - before if np.isfinite(before) else 0.0
    return dict(sorted(jumps.items(), key=lambda item: -item[1]))
