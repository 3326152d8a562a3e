"""What several backends need of an ONNX file: checking it, copying it, its logical shapes.

In: a path. Out: plain values. ``onnx`` is imported inside the functions.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from prune2deploy.atomic import replacing
from prune2deploy.backends.base import TensorSpec
from prune2deploy.errors import BuildError, ConfigError
from prune2deploy.exporting.companions import companions
from prune2deploy.timing import Shape


def check(path: Path) -> Any:
    """Load and check an ONNX file; return its ``ModelProto`` (external weights not loaded).

    Raises:
        BuildError: The file is missing, unreadable, truncated, not ONNX, or breaks the standard.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        found = "found a folder" if path.is_dir() else "no such file"
        raise BuildError(f"{path}: {found}; expected an ONNX model")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except OSError as error:
        raise BuildError(
            f"{path}: cannot be read ({error.strerror or error}); expected an ONNX model that you "
            "may read"
        ) from error
    except (DecodeError, ValueError) as error:
        raise BuildError(
            f"{path}: {path.stat().st_size} bytes that are not an ONNX model ({error}); "
            "it is corrupt, truncated or another format: export it again"
        ) from error
    if not model.graph.node or not model.opset_import:
        raise BuildError(f"{path}: found no ONNX graph in it, expected a model; export it again")
    try:
        onnx.checker.check_model(str(path))
    except (onnx.checker.ValidationError, ValueError) as error:
        raise BuildError(
            f"{path}: not a valid ONNX model: {str(error).strip()}; export it again"
        ) from error
    return model


def place(path: Path, out: Path) -> Path:
    """Copy an ONNX file with its external weights into the folder ``out``; return the copy.

    Raises:
        BuildError: The folder cannot be written.
    """
    for extra in companions(path):
        place_file(path.parent / extra, (out / extra).parent)
    return place_file(path, out)


def place_file(path: Path, out: Path) -> Path:
    """Copy one file into the folder ``out``; return the copy.

    A file that lies there already is left alone. The copy appears under its name only when it is
    complete.

    Raises:
        BuildError: The folder cannot be written.
    """
    copy = out / path.name
    try:
        if copy.exists() and copy.samefile(path):
            return copy
        with replacing(copy) as temporary:
            shutil.copyfile(path, temporary)
    except OSError as error:
        raise BuildError(f"{out}: the engine cannot be written there: {error}") from error
    return copy


def signature(path: Path) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return inputs and outputs of the ONNX file at ``path``, in order.

    Raises:
        ConfigError: One of them is no tensor of numbers that numpy has.
    """
    import onnx

    return signature_of(path, onnx.load(str(path), load_external_data=False).graph)


def signature_of(path: Path, graph: Any) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """The same of a graph that has been read; ``path`` is named in errors."""
    weights = {i.name for i in graph.initializer}
    inputs = tuple(_spec(path, value) for value in graph.input if value.name not in weights)
    return inputs, tuple(_spec(path, value) for value in graph.output)


def _spec(path: Path, value: Any) -> TensorSpec:
    import onnx

    kind = value.type.tensor_type
    told = value.type.WhichOneof("value").replace("_type", "")
    if kind.elem_type:
        told = f"tensor of {onnx.TensorProto.DataType.Name(kind.elem_type).lower()}"
        dtype = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type))
    if not kind.elem_type or dtype.kind not in "fiub":
        raise ConfigError(
            f"{path}: found {value.name!r}, a {told}, among inputs and outputs, expected tensors "
            "of numbers that numpy has; leave that part out of the model"
        )
    return TensorSpec(value.name, tuple(d.dim_value or -1 for d in kind.shape.dim), dtype.name)


@dataclass(frozen=True)
class Node:
    """One node of an ONNX graph: its name (made up where it has none), type and tensors."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]


@dataclass(frozen=True)
class Shapes:
    """Nodes in order, and the shape of every tensor whose shape is known.

    Attributes:
        nodes: In execution order.
        shapes: Tensor name to shape; a dynamic dimension counts as 1.
        producer: Tensor name to the node that makes it.
    """

    nodes: tuple[Node, ...]
    shapes: dict[str, Shape]
    producer: dict[str, Node]


def logical_shapes(path: Path) -> Shapes:
    """Infer the shape of every tensor of the model at ``path``."""
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    for initializer in model.graph.initializer:  # shapes need no values, and values are large
        if len(initializer.raw_data) > 4096:
            initializer.ClearField("raw_data")
            initializer.data_location = onnx.TensorProto.EXTERNAL
    graph = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes = {i.name: tuple(i.dims) for i in graph.initializer}
    for value in (*graph.input, *graph.value_info, *graph.output):
        if value.type.tensor_type.HasField("shape"):
            dims = value.type.tensor_type.shape.dim
            shapes.setdefault(value.name, tuple(d.dim_value or 1 for d in dims))
    nodes = tuple(
        Node(
            n.name or f"{n.op_type}_{i}",
            n.op_type,
            tuple(n.input),
            tuple(n.output),
            {a.name: onnx.helper.get_attribute_value(a) for a in n.attribute},
        )
        for i, n in enumerate(graph.node)
    )
    return Shapes(nodes, shapes, {o: n for n in nodes for o in n.outputs})


def contraction(shapes: Shapes, tensor: str) -> Node | None:
    """Return the convolution that makes ``tensor``, looking back through what fuses into it.

    Runtimes name a fused convolution after the last tensor that it makes: the output of its
    activation, its batch normalisation or its residual addition. The nearest one upstream whose
    output has the shape of ``tensor`` is the one.
    """
    wanted = shapes.shapes.get(tensor)
    queue = [tensor]
    for _ in range(8):  # an activation is a handful of nodes at most (hard-swish, x * sigmoid(x))
        following: list[str] = []
        for name in queue:
            node = shapes.producer.get(name)
            if node is None or shapes.shapes.get(name) != wanted:
                continue
            if node.kind in ("Conv", "ConvTranspose"):
                return node
            following += node.inputs
        queue = following
    return None
