"""fp32 ONNX file → fp16 or int8 ONNX file that still gives the same outputs, near enough.

The precision of every operator is written into the file, so every runtime does the same. What
does not stand the lower precision stays in the higher one: operators whose values leave the range
of fp16 (looked for in the fp32 activations, because CPUs compute fp16 in fp32 and hide it), and
those that comparing activations of both files, and then trying, shows to cost most. The report
carries the parity that was reached and the tolerance.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from prune2deploy.atomic import replacing
from prune2deploy.calibration import Batch
from prune2deploy.errors import ExportError
from prune2deploy.exporting import keeping, parity, quantize
from prune2deploy.exporting.activations import extremes, load_named, sort_nodes
from prune2deploy.exporting.keeping import AccuracyLimit, Found, Judge
from prune2deploy.exporting.parity import Array, Parity
from prune2deploy.exporting.ranges import calibrate, feeds

LARGEST_HALF = 65504.0
HEADROOM = 0.5  # fp16 range that samples may use; other inputs reach further than they do
SQUARES = frozenset({"LayerNormalization", "InstanceNormalization", "GroupNormalization", "Pow",
                     "ReduceL2", "ReduceSumSquare", "LpNormalization"})  # fmt: skip
"""Operators that square their input inside, where the output does not show an overflow."""
COMPARED = 4  # samples that outputs and activations are compared on


@dataclass(frozen=True)
class PrecisionReport:
    """A file in a lower precision.

    Attributes:
        path: The file.
        precision: ``fp16`` or ``int8``.
        kept: Names of the nodes that stayed in the higher precision.
        parity: Outputs against the file that came in.
        drop: Accuracy lost, where it was evaluated.
        passed: Whether the wanted limit was kept.
        samples: Rows of data that ranges come from; 0 for fp16.
    """

    path: Path
    precision: str
    kept: tuple[str, ...]
    parity: Parity
    drop: float | None
    passed: bool
    samples: int = 0


@dataclass(frozen=True)
class Int8Options:
    """Settings of ``to_int8``.

    Attributes:
        recipe: ``tensorrt`` or ``cpu``; see ``quantize``.
        method: ``minmax``, ``entropy`` or ``percentile``; see ``ranges``.
        keep: Nodes that stay in fp32 in any case.
        max_error: Largest ``Parity.rms_rel``; parity's own tolerance unless told.
        accuracy: Decides in place of ``max_error``.
        data: What identifies the calibration data, for ``store``.
        store: JSON file that keeps the ranges.
    """

    recipe: str = "tensorrt"
    method: str = "minmax"
    keep: tuple[str, ...] = ()
    max_error: float | None = None
    accuracy: AccuracyLimit | None = None
    data: str = ""
    store: Path | None = None


def already(path: Path) -> str:
    """The precision that a file holds: ``int8``, ``fp16`` or ``fp32``."""
    graph = onnx.load(str(path), load_external_data=False).graph
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        return "int8"
    halves = [t for t in graph.initializer if t.data_type == TensorProto.FLOAT16]
    return "fp16" if halves else "fp32"


def to_fp16(
    path: Path,
    out: Path,
    *,
    samples: Sequence[Mapping[str, Array]] | None = None,
    tolerance: float | None = None,
    keep: Sequence[str] = (),
    accuracy: AccuracyLimit | None = None,
) -> PrecisionReport:
    """Write ``path`` in half precision, inputs and outputs included, to ``out``.

    Nodes whose values leave the range of fp16 stay in fp32, and then, as long as the outputs
    differ too much or too much accuracy is lost, the nodes that raise the error most.

    Args:
        path: An fp32 file, or an int8 one with pairs of Q and DQ.
        out: Where the result goes.
        samples: Inputs to judge by; random ones unless told.
        tolerance: Largest ``Parity.max_rel``; the one of fp16 unless told.
        keep: Nodes that stay in fp32 in any case.
        accuracy: Decides in place of ``tolerance``.

    Raises:
        ExportError: The model cannot be converted.
    """
    chosen = (samples or parity.random_samples(path, count=2))[:COMPARED]
    fixed = list(dict.fromkeys([*_overflowing(path, chosen), *keep]))

    def convert(target: Path, kept: Collection[str]) -> None:
        _write_half(path, target, [*fixed, *kept])

    judge = Judge(path, chosen, "fp16", (tolerance, accuracy))
    found = keeping.search(out, convert, judge)
    kept = (*fixed, *(name for name in found.kept if name not in set(fixed)))
    return _report("fp16", found, kept)


def to_int8(
    path: Path, out: Path, batches: Iterable[Batch], options: Int8Options | None = None
) -> PrecisionReport:
    """Quantise ``path`` statically to int8 with pairs of Q and DQ, written to ``out``.

    Nodes with infinite values stay in fp32, and then layers that raise the error most, until the
    limit of ``options`` is kept, as far as ``keeping`` finds them; the report says which, and
    whether it was.

    Args:
        path: The fp32 file; simplified, with normalisations folded.
        out: Where the result goes.
        batches: Calibration data: (inputs, labels or None), iterable more than once.
        options: See ``Int8Options``.

    Raises:
        ExportError: No data, or the model cannot be quantised.
    """
    chosen = options or Int8Options()
    ranges = calibrate(path, batches, chosen.method, data=chosen.data, store=chosen.store)
    samples = [sample for sample, _ in zip(feeds(path, batches), range(COMPARED), strict=False)]
    every = quantize.kinds(path, chosen.recipe)
    names = {name for kind in every.values() for name in kind}
    fixed = list(dict.fromkeys([*quantize.unbounded(path, ranges, names), *chosen.keep]))

    def convert(target: Path, kept: Collection[str]) -> None:
        quantize.quantize(path, target, ranges, chosen.recipe, [*fixed, *kept])

    judge = Judge(path, samples, "int8", (chosen.max_error, chosen.accuracy))
    kinds = {kind: [name for name in of if name not in fixed] for kind, of in every.items()}
    open_names = [name for kind in kinds.values() for name in kind]
    cheap = [k for operator, k in kinds.items() if k and operator not in quantize.CONTRACTIONS]
    found = keeping.search(out, convert, judge, open_names, cheap)
    report = _report("int8", found, (*fixed, *found.kept))
    return replace(report, samples=ranges.samples)


def _report(precision: str, found: Found, kept: Sequence[str]) -> PrecisionReport:
    return PrecisionReport(
        path=found.path,
        precision=precision,
        kept=tuple(kept),
        parity=found.verdict.parity,
        drop=found.verdict.drop,
        passed=found.verdict.passed,
    )


def _overflowing(path: Path, samples: Sequence[Mapping[str, Array]]) -> list[str]:
    """Nodes with an input, an output or a weight outside fp16, or whose squares are.

    Infinity is within: fp16 has it.
    """
    limit = LARGEST_HALF * HEADROOM
    ends = extremes(path, samples, finite=True)
    tops = {name: max(abs(low), abs(high)) for name, (low, high) in ends.items()}
    model = load_named(path)
    for tensor in model.graph.initializer:
        array = numpy_helper.to_array(tensor)
        if tensor.data_type == TensorProto.FLOAT:
            tops[tensor.name] = float(abs(array[np.isfinite(array)]).max(initial=0.0))
    found = []
    for node in model.graph.node:
        top = max((tops.get(name, 0.0) for name in (*node.input, *node.output)), default=0.0)
        square = max((tops.get(name, 0.0) for name in node.input[:1]), default=0.0) ** 2
        if top > limit or (node.op_type in SQUARES and square > limit):
            found.append(node.name)
    return found


def _write_half(path: Path, out: Path, blocked: Sequence[str]) -> None:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    model = load_named(path)
    try:
        with warnings.catch_warnings():  # weights that fp16 rounds to zero or to its largest
            warnings.filterwarnings("ignore", message=".*truncated to.*", category=UserWarning)
            half = convert_float_to_float16(
                model, keep_io_types=False, node_block_list=list(blocked)
            )
        _join_casts(half.graph, set(blocked))
        sort_nodes(half.graph)
        del half.graph.value_info[:]  # some still tell the types of before
        with replacing(out) as temporary:
            onnx.save_model(half, str(temporary))
            onnx.checker.check_model(str(temporary), full_check=True)
    except OSError:
        raise  # a full disk says so itself
    except Exception as error:
        raise ExportError(
            f"{path}: cannot be converted to fp16 ({type(error).__name__}: {str(error)[:300]}); "
            "use fp32"
        ) from error


def _join_casts(graph: Any, blocked: Collection[str]) -> None:
    """Connect neighbours that both stayed in fp32 directly: between them fp16 would overflow."""
    wide = {output for node in graph.node if node.name in blocked for output in node.output}
    halves = {n.output[0]: n.input[0] for n in _casts(graph, TensorProto.FLOAT16)}
    names = {
        n.output[0]: halves[n.input[0]]
        for n in _casts(graph, TensorProto.FLOAT)
        if halves.get(n.input[0]) in wide
    }
    for node in graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = names.get(name, name)
    for kind in (TensorProto.FLOAT, TensorProto.FLOAT16):  # consumers before their producers
        used = {name for node in graph.node for name in node.input}
        used |= {output.name for output in graph.output}
        for node in [n for n in _casts(graph, kind) if n.output[0] not in used]:
            graph.node.remove(node)


def _casts(graph: Any, kind: int) -> list[Any]:
    return [
        node
        for node in graph.node
        if node.op_type == "Cast" and any(a.name == "to" and a.i == kind for a in node.attribute)
    ]
