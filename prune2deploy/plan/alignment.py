"""Find the channel multiple of a device by timing small models on it.

In: a function that times an ONNX file on the target. Out: per kernel family the staircase of time
over width, and its step: runtimes compute channels in whole blocks, so a width just above a block
costs as much as the next block. Each probe model is a chain 64 → w → 64 → w → 64 whose time is
linear in the blocks of w.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

WIDTHS = (64, 66, 68, 70, 72, 74, 80, 88, 96, 100, 112, 128)
STEPS = (1, 4, 8, 16, 32, 64)
FAMILIES = ("conv3x3", "conv1x1", "depthwise", "matmul")

ROUNDS = 3  # over all widths: what disturbs the host for a while spoils one of them only

_OUTER = 64  # channels at both ends of a chain
_MAP = 28  # pixels
_ROWS = 196  # of the matrix products
_PAIRS = 2
_CLIFF = 1.05  # off the fast path: slower than the next wider model by this factor
_BETTER = 0.6  # a coarser step must leave at most this share of the finer one's squared error
_FLAT = 0.006  # squared errors below this relative size are noise


class StaircaseStore(Protocol):
    """Where staircases are kept between runs (``search.recall.Timings``)."""

    def staircase(self, family: str) -> dict[int, float] | None:
        """A probed staircase, or ``None``."""

    def add_staircase(self, family: str, staircase: Mapping[int, float]) -> None:
        """Keep a probed staircase."""


@dataclass(frozen=True)
class Staircase:
    """Time over width of one kernel family.

    Attributes:
        family: One of ``FAMILIES``.
        widths: Channels, ascending.
        ns: Time of the probe model at each width, in nanoseconds.
        step: Width of a step; 1 where time simply grows.
        cliff: Whether widths that are not a multiple of 4 leave the fast path.
        sure: Whether it reads alike without any one of the rounds in which it was timed.
    """

    family: str
    widths: tuple[int, ...]
    ns: tuple[float, ...]
    step: int
    cliff: bool
    sure: bool = True


def probe_alignment(
    time_ns: Callable[[Path], float],
    folder: Path,
    *,
    store: StaircaseStore | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> tuple[Staircase, ...]:
    """Time the probe models on a target.

    Args:
        time_ns: Builds an ONNX file for the target and gives its least time over some runs;
            called several times for each file.
        folder: Where the ONNX files are written.
        store: Results of earlier probes of this device; new ones that are sure are added to it:
            on a disturbed host the next run probes again.
        tell: Hears of progress: timings taken, timings in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, family in enumerate(FAMILIES):
        known = store.staircase(family) if store is not None else None
        if known is not None:
            found.append(read_staircase(family, known))
            continue
        rounds: list[dict[int, float]] = [{} for _ in range(ROUNDS)]
        for done, (turn, width) in enumerate(itertools.product(rounds, WIDTHS), start=1):
            path = folder / f"{family}-{width}.onnx"
            if not path.exists():
                write_probe(family, width, path)
            turn[width] = time_ns(path)
            if tell is not None:
                each = ROUNDS * len(WIDTHS)
                tell(number * each + done, len(FAMILIES) * each)
        found.append(_read_rounds(family, rounds))
        if store is not None and found[-1].sure:
            store.add_staircase(family, dict(zip(WIDTHS, found[-1].ns, strict=True)))
    return tuple(found)


def _read_rounds(family: str, rounds: Sequence[Mapping[int, float]]) -> Staircase:
    """The staircase of the least times of all rounds, and whether it hangs on none of them."""

    def read(taken: Iterable[Mapping[int, float]]) -> Staircase:
        each = tuple(taken)
        return read_staircase(family, {w: min(one[w] for one in each) for w in WIDTHS})

    whole = read(rounds)
    others = map(read, itertools.combinations(rounds, len(rounds) - 1))
    sure = all((one.step, one.cliff) == (whole.step, whole.cliff) for one in others)
    return replace(whole, sure=sure)


def channel_multiple(staircases: Sequence[Staircase]) -> int:
    """The multiple that widths should keep: the coarsest step of the probed families.

    Where no family has steps but unaligned widths leave the fast path, it is 4.
    """
    cliff = 4 if any(s.cliff for s in staircases) else 1
    return max([s.step for s in staircases] + [cliff])


def read_staircase(family: str, times: Mapping[int, float]) -> Staircase:
    """Find the step of one family from its times in nanoseconds by width."""
    widths = tuple(sorted(times))
    ns = tuple(float(times[width]) for width in widths)
    aligned = {w: t for w, t in zip(widths, ns, strict=True) if w % 4 == 0}
    cliff = any(
        time > _CLIFF * min(t for w, t in aligned.items() if w > width)
        for width, time in zip(widths, ns, strict=True)
        if width % 4 and width < max(aligned)
    )
    shown = aligned if cliff else dict(zip(widths, ns, strict=True))
    step = _step(np.array(list(shown)), np.array(list(shown.values())))
    return Staircase(family, widths, ns, max(step, 4) if cliff and step > 1 else step, cliff)


def _step(widths: npt.NDArray[np.int64], ns: npt.NDArray[np.float64]) -> int:
    """The step whose blocks explain the times best; a coarser one must be clearly better."""
    best, error = 1, _error(widths, ns, 1)
    for step in STEPS[1:]:
        its = _error(widths, ns, step)
        if its < _BETTER * error and error > _FLAT**2:
            best, error = step, its
    return best


def _error(widths: npt.NDArray[np.int64], ns: npt.NDArray[np.float64], step: int) -> float:
    """Mean squared relative error of a straight line over whole blocks."""
    blocks = -(-widths // step) * float(step)
    weight = 1.0 / ns
    features = np.stack([blocks * weight, weight], axis=1)
    line = np.linalg.lstsq(features, np.ones(len(ns)), rcond=None)[0]
    return float(np.mean((features @ line - 1.0) ** 2))


def write_probe(family: str, width: int, path: Path) -> None:
    """Write the probe model of one family and width as an ONNX file."""
    import onnx
    from onnx import TensorProto, helper

    rng = np.random.default_rng(width)
    nodes: list[Any] = []
    weights: list[Any] = []
    current = "input"
    for pair in range(_PAIRS):
        for name, shape, groups in _chain(family, width):
            weight = f"{name}{pair}"
            values = rng.standard_normal(shape).astype(np.float32) / np.sqrt(np.prod(shape[1:]))
            weights.append(onnx.numpy_helper.from_array(values.astype(np.float32), weight))
            nodes.append(_node(helper, family, (current, weight, f"{weight}_out"), shape, groups))
            current = f"{weight}_out"
    ends = [_ROWS, _OUTER] if family == "matmul" else [1, _OUTER, _MAP, _MAP]
    graph = helper.make_graph(
        nodes,
        f"{family}-{width}",
        [helper.make_tensor_value_info("input", TensorProto.FLOAT, ends)],
        [helper.make_tensor_value_info(current, TensorProto.FLOAT, ends)],
        weights,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, str(path))


def _chain(family: str, width: int) -> tuple[tuple[str, tuple[int, ...], int], ...]:
    """Name, weight shape and groups of each operator of one pair."""
    if family == "matmul":
        return (("a", (_OUTER, width), 1), ("b", (width, _OUTER), 1))
    kernel = 3 if family == "conv3x3" else 1
    first, last = (width, _OUTER, kernel, kernel), (_OUTER, width, kernel, kernel)
    if family == "depthwise":
        return (("a", first, 1), ("d", (width, 1, 3, 3), width), ("b", last, 1))
    return (("a", first, 1), ("b", last, 1))


def _node(
    helper: Any, family: str, names: tuple[str, str, str], shape: tuple[int, ...], groups: int
) -> Any:
    data, weight, made = names
    if family == "matmul":
        return helper.make_node("MatMul", [data, weight], [made], name=made)
    border = shape[2] // 2
    return helper.make_node(
        "Conv",
        [data, weight],
        [made],
        name=made,
        kernel_shape=list(shape[2:]),
        pads=[border] * 4,
        group=groups,
    )
