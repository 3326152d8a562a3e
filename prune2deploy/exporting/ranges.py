"""Calibration: the range of every activation, for static int8.

In: an ONNX file and batches. Out: ``Ranges``, kept as JSON and keyed by the ONNX file, the data
and the method. Memory does not grow with the number of samples: least and largest values are
reduced inside the graph, and histograms have fixed bins, set by a first pass over the data.

Methods:
    minmax: Least and largest value seen.
    percentile: The magnitude that 99.99 % of the values do not exceed.
    entropy: The magnitude whose 128-level histogram diverges least from the full one (Migacz,
        "8-bit inference with TensorRT", GPU Technology Conference 2017).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx

from prune2deploy.atomic import write_text
from prune2deploy.calibration import Batch, filled, restarting
from prune2deploy.errors import ExportError
from prune2deploy.exporting import companions
from prune2deploy.exporting.activations import (
    extremes,
    float_tensors,
    load_named,
    opened,
    with_outputs,
)
from prune2deploy.exporting.parity import Array
from prune2deploy.target import INT8_RANGES

SCHEMA = 1  # 1: what Ranges holds
METHODS = INT8_RANGES
BINS = 2048
LEVELS = 128  # of the magnitude: int8 without its sign
PERCENTILE = 99.99

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Ranges:
    """Range of every activation.

    Attributes:
        onnx_sha256: Of the ONNX file and the files beside it that hold its weights.
        data: Name or hash of the calibration data that the caller gives.
        method: One of ``METHODS``.
        samples: Rows of data that were seen.
        ranges: Tensor name to its lower and upper end; not finite where the tensor was not.
    """

    onnx_sha256: str
    data: str
    method: str
    samples: int
    ranges: Mapping[str, tuple[float, float]]

    def to_json(self) -> str:
        """Write as JSON text."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> Ranges:
        """Read what ``to_json`` wrote; raises ValueError, TypeError or KeyError if not."""
        values = json.loads(text)
        if values.pop("schema") != SCHEMA:
            raise ValueError(f"expected schema {SCHEMA}")
        stored = dict(values.pop("ranges"))
        pairs = {name: (float(low), float(high)) for name, (low, high) in stored.items()}
        return Ranges(ranges=pairs, **values)


def calibrate(
    path: Path,
    batches: Iterable[Batch],
    method: str = "minmax",
    *,
    data: str = "",
    store: Path | None = None,
) -> Ranges:
    """Run the data through the model and find every activation's range.

    Args:
        path: The fp32 ONNX file.
        batches: Calibration data; read once for ``minmax``, twice otherwise.
        method: One of ``METHODS``.
        data: What identifies the data; ranges are taken from ``store`` only if it is given.
        store: JSON file to take the ranges from if it fits, and to write them to.

    Raises:
        ExportError: No data, or an unknown method.
        ConfigError: The data can be read only once.
    """
    if method not in METHODS:
        raise ExportError(f"calibration method {method!r}: expected one of {', '.join(METHODS)}")
    restarting(batches)
    digest = companions.digest(path)
    if store is not None and data:
        known = _stored(store)
        if known and (known.onnx_sha256, known.data, known.method) == (digest, data, method):
            return known
    counter = [0]
    ends = extremes(path, feeds(path, _counted(batches, counter)))
    if not counter[0]:
        raise ExportError("there is no calibration data: the recipe gave no batch")
    if method != "minmax":
        ends = _clip(ends, _thresholds(path, feeds(path, batches), ends, method))
    found = Ranges(digest, data, method, counter[0], ends)
    if store is not None:
        write_text(store, found.to_json())
    return found


def feeds(path: Path, batches: Iterable[Batch]) -> Iterator[dict[str, Array]]:
    """Batches as inputs of an ONNX file by name, of the file's own batch where that is fixed.

    A last batch that does not fill it repeats its samples; see ``calibration.filled``.
    """
    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {t.name for t in graph.initializer}
    inputs = [given for given in graph.input if given.name not in stored]
    dims = inputs[0].type.tensor_type.shape.dim
    fixed = dims[0].dim_value if dims and dims[0].HasField("dim_value") else 0
    for tensors in filled(batches, fixed) if fixed else (given for given, _ in batches):
        if len(tensors) != len(inputs):
            raise ExportError(f"a batch has {len(tensors)} inputs, the model has {len(inputs)}")
        arrays = (tensor.detach().cpu().numpy() for tensor in tensors)
        yield {given.name: array for given, array in zip(inputs, arrays, strict=True)}


def entropy_threshold(counts: Counts) -> int:
    """Bin at which to saturate a histogram of magnitudes so that 128 levels lose least.

    Args:
        counts: Values per bin, at least ``LEVELS`` bins.

    Returns:
        Number of bins kept, between ``LEVELS`` and ``len(counts)``.
    """
    counts = counts.copy()
    counts[0] = counts[1]  # zeros, of which a ReLU makes many, lose nothing at any threshold
    best, least = len(counts), np.inf
    for kept in range(LEVELS, len(counts) + 1, LEVELS // 8):
        reference = counts[:kept].astype(np.float64)
        level = np.arange(kept) * LEVELS // kept
        filled = reference > 0
        mass = np.bincount(level, reference, LEVELS)
        width = np.bincount(level, filled, LEVELS)
        coarse = np.where(filled, (mass / np.maximum(width, 1))[level], 0.0)
        reference[-1] += counts[kept:].sum()  # what saturates piles up in the last bin
        divergence = _divergence(reference, coarse)
        if divergence < least:
            best, least = kept, divergence
    return best


def percentile_threshold(counts: Counts, percentile: float = PERCENTILE) -> int:
    """Number of bins that hold ``percentile`` per cent of the values."""
    share = np.cumsum(counts) / max(int(counts.sum()), 1)
    return int(np.searchsorted(share, percentile / 100.0) + 1)


def _divergence(p: npt.NDArray[np.float64], q: npt.NDArray[np.float64]) -> float:
    """Kullback-Leibler divergence; mass where ``q`` has none counts as a tiny share there."""
    p, q = p / max(p.sum(), 1.0), q / max(q.sum(), 1.0)
    there = p > 0
    return float(np.sum(p[there] * np.log(p[there] / np.maximum(q[there], 1e-9))))


def _thresholds(
    path: Path,
    samples: Iterable[Mapping[str, Array]],
    ends: Mapping[str, tuple[float, float]],
    method: str,
) -> dict[str, float]:
    """Second pass: a histogram of magnitudes per tensor, over the range that the first saw.

    A tensor that was infinite somewhere has no threshold.
    """
    model = load_named(path)
    names = [name for name in float_tensors(model) if np.isfinite(ends[name]).all()]
    tops = {name: max(abs(ends[name][0]), abs(ends[name][1]), 1e-12) for name in names}
    counts = {name: np.zeros(BINS, np.int64) for name in names}
    with opened(with_outputs(model, names)) as run:
        for sample in samples:
            for name, value in run(sample).items():
                bins = (np.abs(value).ravel() * np.float32(BINS / tops[name])).astype(np.int32)
                counts[name] += np.bincount(np.minimum(bins, BINS - 1), minlength=BINS)
    choose = entropy_threshold if method == "entropy" else percentile_threshold
    return {name: choose(counts[name]) * tops[name] / BINS for name in names}


def _clip(
    ends: Mapping[str, tuple[float, float]], limits: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    clipped = {n: (max(ends[n][0], -top), min(ends[n][1], top)) for n, top in limits.items()}
    return {**ends, **clipped}


def _counted(batches: Iterable[Batch], counter: list[int]) -> Iterator[Batch]:
    for batch in batches:
        counter[0] += len(batch[0][0])
        yield batch


def _stored(path: Path) -> Ranges | None:
    """Ranges kept in a file; ``None`` if there is none or it is damaged (they are redone)."""
    try:
        return Ranges.from_json(path.read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None
