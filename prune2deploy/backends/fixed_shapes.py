"""An ONNX file with free dimensions → one whose inputs all have fixed shapes, to be timed.

In: the path of a file and what its free dimensions are to be. Out: the path of a file without any:
itself, or a copy. Latency is that of one shape; nothing is guessed but a batch of 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prune2deploy.backends import onnx_file
from prune2deploy.errors import ConfigError


@dataclass(frozen=True)
class Wanted:
    """Values of free dimensions.

    Attributes:
        batch: The first one of every input; ``None`` takes 1.
        size: Height and width, the last two of inputs with four; ``None`` leaves them free.
    """

    batch: int | None = None
    size: tuple[int, int] | None = None


def fixed(path: Path, out: Path, wanted: Wanted) -> Path:
    """Return a file whose inputs have fixed shapes: ``path``, or a copy in the folder ``out``.

    Raises:
        ConfigError: A dimension stays free, a value is asked for that no dimension has, an input
            or output is no tensor of numbers, or the copy would take the place of the file itself.
        BuildError: The folder cannot be written.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    onnx_file.signature_of(path, model.graph)
    stored = {tensor.name for tensor in model.graph.initializer}
    inputs = [given for given in model.graph.input if given.name not in stored]
    before = [_shown(given) for given in inputs]
    names = _fix(inputs, wanted)
    _rename([*inputs, *model.graph.value_info, *model.graph.output], names)
    for given in inputs:
        _require_fixed(path, given)
    _require_met(path, inputs, wanted)
    if before == [_shown(given) for given in inputs]:
        return path
    copy = onnx_file.place(path, out)
    if copy.samefile(path):
        raise ConfigError(
            f"{path}: found {out}, which it lies in, as the folder for a copy with fixed shapes, "
            "expected another one, as the copy has the same name"
        )
    onnx.save_model(onnx.shape_inference.infer_shapes(model, data_prop=True), str(copy))
    return copy


def _fix(inputs: list[Any], wanted: Wanted) -> dict[str, int]:
    """Give free dimensions of inputs their value, in place; return those that had a name."""
    names: dict[str, int] = {}
    lengths = {d.dim_param for given in inputs for d in given.type.tensor_type.shape.dim[1:]}
    for given in inputs:
        for dim, value in _values(given, wanted, lengths - {""}):
            if dim.dim_param:
                names[dim.dim_param] = value
            if not dim.dim_value:
                dim.dim_value = value
    return names


def _rename(values: list[Any], names: dict[str, int]) -> None:
    """Give every dimension of a name its value, in place."""
    for value in values:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_value = names[dim.dim_param]


def _values(given: Any, wanted: Wanted, lengths: set[str]) -> Iterator[tuple[Any, int]]:
    """The dimensions of an input that have a wanted value, and that value.

    The first is the batch unless its name is among ``lengths``, which stand elsewhere too.
    """
    dims = given.type.tensor_type.shape.dim
    if dims and dims[0].dim_param not in lengths:
        yield dims[0], wanted.batch or 1
    if len(dims) == 4 and wanted.size is not None:
        yield from zip(dims[2:], wanted.size, strict=True)


def _require_fixed(path: Path, given: Any) -> None:
    dims = given.type.tensor_type.shape.dim
    if all(dim.dim_value for dim in dims):
        return
    fills = len(dims) == 4 and dims[1].dim_value
    what = (
        "give --input-size HxW"
        if fills
        else "export it with fixed shapes, since --input-size fills height and width of inputs "
        "with four dimensions only"
    )
    raise ConfigError(
        f"{path}: input {given.name!r} has dimensions {_shown(given)}, expected none that is free "
        f"but the first, as latency is that of one shape; {what}"
    )


def _require_met(path: Path, inputs: list[Any], wanted: Wanted) -> None:
    """Raise ConfigError where a value was asked for and no input is of it."""
    shapes = [[dim.dim_value for dim in i.type.tensor_type.shape.dim] for i in inputs]
    batches = [shape[0] for shape in shapes if shape]
    sizes = [tuple(shape[2:]) for shape in shapes if len(shape) == 4]
    unmet = ""
    if wanted.batch is not None and wanted.batch not in batches:
        unmet = f"--batch {wanted.batch}"
    elif wanted.size is not None and wanted.size not in sizes:
        unmet = f"--input-size {wanted.size[0]}x{wanted.size[1]}"
    if unmet:
        told = ", ".join(f"{given.name} {_shown(given)}" for given in inputs)
        raise ConfigError(
            f"{path}: found inputs of fixed shapes ({told}), to which {unmet} cannot apply; leave "
            "it out, or export the file with that shape or with free dimensions"
        )


def _shown(given: Any) -> str:
    dims = given.type.tensor_type.shape.dim
    return f"({', '.join(str(d.dim_value or d.dim_param or '?') for d in dims)})"
