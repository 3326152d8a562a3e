"""fp32 ONNX file + activation ranges → int8 ONNX file with QuantizeLinear/DequantizeLinear pairs.

Two recipes, because runtimes want different graphs:

    tensorrt  signed, symmetric, weights per channel, biases left in fp32: a quantised bias or
              asymmetric activations fail to build there
    cpu       unsigned activations, signed weights, which ONNX Runtime's CPU kernels are made for
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from prune2deploy.atomic import replacing
from prune2deploy.errors import ExportError
from prune2deploy.exporting.activations import load_named
from prune2deploy.exporting.ranges import Ranges

CONTRACTIONS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Recipe:
    """How a runtime wants its int8 graph.

    Attributes:
        unsigned_activations: QUInt8 with a zero point in place of symmetric QInt8.
        operators: Operator types to quantise; empty for all that ONNX Runtime can.
        quantize_bias: Store biases as int32.
        per_channel: One weight scale per output channel.
    """

    unsigned_activations: bool
    operators: tuple[str, ...]
    quantize_bias: bool
    per_channel: bool


RECIPES = {
    "tensorrt": Recipe(
        unsigned_activations=False,
        operators=(*CONTRACTIONS, "Add", "MaxPool", "AveragePool", "GlobalAveragePool"),
        quantize_bias=False,
        per_channel=True,
    ),
    "cpu": Recipe(unsigned_activations=True, operators=(), quantize_bias=True, per_channel=True),
}


def quantize(
    path: Path, out: Path, ranges: Ranges, recipe: str, keep: Collection[str] = ()
) -> Path:
    """Write the int8 graph of ``path`` to ``out``.

    Args:
        path: The fp32 ONNX file that the ranges were taken on.
        out: Where the result goes.
        ranges: Of every activation.
        recipe: Key into ``RECIPES``.
        keep: Names of nodes that stay as they are.

    Raises:
        ExportError: Unknown recipe, or the model cannot be quantised.
    """
    if recipe not in RECIPES:
        raise ExportError(f"int8 recipe {recipe!r}: expected one of {', '.join(RECIPES)}")
    try:
        model = _with_pairs(load_named(path), ranges, RECIPES[recipe], keep)
        with replacing(out) as temporary:
            onnx.save_model(model, str(temporary))
            onnx.checker.check_model(str(temporary))
    except OSError:
        raise  # a full disk says so itself
    except Exception as error:
        raise ExportError(
            f"{path}: cannot be quantised to int8 ({type(error).__name__}: {str(error)[:300]}); "
            "use fp32 or fp16"
        ) from error
    return out


def kinds(path: Path, recipe: str) -> dict[str, list[str]]:
    """Names of the nodes that the recipe quantises, by operator type."""
    operators = RECIPES[recipe].operators or _all_operators()
    found: dict[str, list[str]] = {}
    for node in load_named(path).graph.node:
        if node.op_type in operators:
            found.setdefault(node.op_type, []).append(node.name)
    return found


def unbounded(path: Path, ranges: Ranges, wanted: Collection[str]) -> list[str]:
    """Names of nodes among ``wanted`` that read or make infinite values.

    No scale holds those; what masks attention is such a value.
    """
    model = load_named(path)
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT]
    found = {t.name for t in floats if not np.isfinite(numpy_helper.to_array(t)).all()}
    found |= {name for name, ends in ranges.ranges.items() if not np.isfinite(ends).all()}
    touching = (n.name for n in model.graph.node if found & {*n.input, *n.output})
    return [name for name in touching if name in wanted]


def _with_pairs(model: Any, ranges: Ranges, recipe: Recipe, keep: Collection[str]) -> Any:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

    activation = QuantType.QUInt8 if recipe.unsigned_activations else QuantType.QInt8
    quantizer = QDQQuantizer(
        model,
        recipe.per_channel,
        False,  # reduce_range: 7-bit weights, only for old CPUs
        QuantType.QInt8,
        activation,
        _tensors_data(ranges),
        [],
        list(keep),
        list(recipe.operators or _all_operators()),
        {
            "ActivationSymmetric": not recipe.unsigned_activations,
            "WeightSymmetric": True,
            "QuantizeBias": recipe.quantize_bias,
        },
    )
    with _quiet():
        quantizer.quantize_model()
    quantizer.model.topological_sort()  # it appends its nodes at the end
    return quantizer.model.model


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the quantiser's remarks on single weights, made through the root logger, to itself."""

    def nothing(record: logging.LogRecord) -> bool:
        return False

    root = logging.getLogger()
    root.addFilter(nothing)
    try:
        yield
    finally:
        root.removeFilter(nothing)


def _all_operators() -> tuple[str, ...]:
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    return tuple(dict.fromkeys([*QLinearOpsRegistry, *QDQRegistry]))


def _tensors_data(ranges: Ranges) -> Any:
    from onnxruntime.quantization.calibrate import CalibrationMethod, TensorData, TensorsData

    data = {
        name: TensorData(lowest=np.float32(low), highest=np.float32(high))
        for name, (low, high) in ranges.ranges.items()
    }
    return TensorsData(CalibrationMethod.MinMax, data)
