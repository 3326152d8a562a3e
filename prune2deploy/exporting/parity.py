"""Do two stages of the pipeline give the same outputs? torch ↔ ONNX ↔ simplified ↔ engine.

In: two runners (anything that maps named inputs to named outputs) and samples. Out: ``Parity``
with the figures, the tolerance that was used and the worst output. Nothing is assumed about
where a runner computes, so an opened engine's ``run`` is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from prune2deploy.errors import ExportError, ParityError
from prune2deploy.exporting.export import first_line, flatten, input_names
from prune2deploy.graph.calling import device_of
from prune2deploy.random_inputs import draw

Array = npt.NDArray[Any]
Runner = Callable[[Mapping[str, Array]], Mapping[str, Array]]

TOLERANCE: Mapping[str, float] = {"fp32": 1e-3, "tf32": 1e-2, "fp16": 2e-2, "int8": 0.1}
"""Largest accepted error per precision of the less precise side: ``max_rel``, but ``rms_rel`` for
int8, whose largest single error grows with the number of elements and says little. TF32 is fp32
whose products keep the ten fraction bits of fp16: rounding a YOLOv8n's operands so moves its
outputs by up to 0.002."""

_FINEST = (
    "both sides compute in fp32, so no higher precision helps: check that the model gives the same "
    "outputs twice for one input, and that its weights are trained (with random ones, activations "
    "may grow or vanish until rounding shows); what is left is an operator that the exporter or "
    "the runtime gets wrong, which another opset or version of it may not"
)
_CHANNEL_FLOOR = 1e-3  # a channel counts as at least this fraction of the whole output's scale
_SMALLEST_SCALE = 1e-7


@dataclass(frozen=True)
class Parity:
    """How far two stages are apart.

    Attributes:
        max_abs: Largest absolute difference of any element of any output.
        max_rel: Largest difference over the scale of its channel; see ``compare``.
        worst_output: Name of the output with the largest error, of the kind that is judged.
        tolerance: Error up to which the stages agree.
        passed: Whether they do.
        samples: How many inputs were compared.
        vacuous: Outputs that were zero or not finite everywhere on the reference side: agreeing
            on them proves nothing.
        rms_rel: Root mean square of the differences over that of the reference, worst output.
        judged: ``max_rel`` or ``rms_rel``: which of the two is held against the tolerance.
        precision: Of the less precise side.
    """

    max_abs: float
    max_rel: float
    worst_output: str
    tolerance: float
    passed: bool
    samples: int = 1
    vacuous: tuple[str, ...] = ()
    rms_rel: float = 0.0
    judged: str = "max_rel"
    precision: str = "fp32"

    @property
    def error(self) -> float:
        """The figure that is held against the tolerance."""
        return self.rms_rel if self.judged == "rms_rel" else self.max_rel


def compare(
    reference: Runner,
    candidate: Runner,
    samples: Iterable[Mapping[str, Array]],
    *,
    precision: str = "fp32",
    tolerance: float | None = None,
) -> Parity:
    """Run both on every sample and compare all outputs.

    A difference is divided by the largest reference value of its channel (dimension 1 of
    tensors with three or more dimensions, else the whole output), to which 1/1000 of the
    whole output's largest value is added. So class scores beside pixel coordinates in one
    tensor are held to their own scale. Integer outputs are compared by the share of elements
    that differ. A NaN on one side only, or an infinity on one side only, is an infinite error.

    Args:
        reference: The stage that is trusted.
        candidate: The stage that is checked.
        samples: Inputs by name; not empty.
        precision: Of the less precise side; chooses the tolerance from ``TOLERANCE``.
        tolerance: Overrides it.

    Raises:
        ParityError: The two have different outputs or shapes, or there was no sample.
    """
    judged = "rms_rel" if precision == "int8" else "max_rel"
    limit = TOLERANCE[precision] if tolerance is None else tolerance
    errors, zero, count = _errors(reference, candidate, samples)
    if not count:
        raise ParityError("no samples to compare outputs on: give at least one input")
    worst = max(errors, key=lambda name: errors[name][judged])
    return Parity(
        max_abs=max(error["max_abs"] for error in errors.values()),
        max_rel=max(error["max_rel"] for error in errors.values()),
        worst_output=worst,
        tolerance=limit,
        passed=errors[worst][judged] <= limit,
        samples=count,
        vacuous=tuple(name for name, all_zero in zero.items() if all_zero),
        rms_rel=max(error["rms_rel"] for error in errors.values()),
        judged=judged,
        precision=precision,
    )


def _errors(
    reference: Runner, candidate: Runner, samples: Iterable[Mapping[str, Array]]
) -> tuple[dict[str, dict[str, float]], dict[str, bool], int]:
    """Largest error of each kind per output, whether its reference told nothing, and a count."""
    errors: dict[str, dict[str, float]] = {}
    zero: dict[str, bool] = {}
    count = 0
    for feeds in samples:
        count += 1
        for name, expected, found in _paired(reference(feeds), candidate(feeds)):
            absolute, relative = difference(expected, found)
            now = {"max_abs": absolute, "max_rel": relative, "rms_rel": rms(expected, found)}
            top = errors.setdefault(name, now)
            errors[name] = {kind: max(top[kind], now[kind]) for kind in now}
            zero[name] = zero.get(name, True) and not telling(expected)
    return errors, zero, count


def require(parity: Parity, stages: str) -> Parity:
    """Return ``parity`` if it passed, else raise.

    Args:
        parity: What ``compare`` gave.
        stages: What was compared, for the message (``"torch and ONNX"``).

    Raises:
        ParityError: It did not pass.
    """
    if not parity.passed:
        advice = _FINEST if parity.precision == "fp32" else "a higher precision may pass"
        raise ParityError(
            f"{stages} disagree: output {parity.worst_output!r} is off by {parity.error:.3g} of "
            f"its scale (at most {parity.max_abs:.3g} absolute) over {parity.samples} samples, "
            f"{parity.tolerance:.3g} is allowed. Do not use the result; {advice}"
        )
    return parity


def require_numbers(model: Runner, samples: Sequence[Mapping[str, Array]]) -> tuple[str, ...]:
    """Raise ParityError where a model returns NaN: two stages that fail alike would agree.

    Returns:
        Names of outputs that hold nothing but zeros and infinity, of which agreement shows little.
    """
    outputs = model(samples[0])
    for name, output in outputs.items():
        if np.issubdtype(output.dtype, np.floating) and np.isnan(output).any():
            raise ParityError(
                f"output {name!r} of the model holds {int(np.isnan(output).sum())} NaN of "
                f"{output.size} values on the example inputs, expected numbers; check the weights "
                "and the range of the inputs"
            )
    return tuple(name for name, output in outputs.items() if not telling(output))


def telling(output: Array) -> bool:
    """Whether an output holds any value that agreeing on shows something: finite and not zero."""
    return bool((np.isfinite(output) & (output != 0)).any())


def difference(expected: Array, found: Array) -> tuple[float, float]:
    """Largest absolute and largest scaled difference of two arrays of one shape.

    >>> difference(np.array([1.0, 2.0]), np.array([1.0, 2.0]))
    (0.0, 0.0)
    """
    if not expected.size:
        return 0.0, 0.0
    if not np.issubdtype(expected.dtype, np.floating):
        differs = np.asarray(expected != found)
        apart = abs(expected.astype(float) - found) if expected.dtype.kind in "biu" else differs
        return float(apart.max()), float(differs.mean())
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = np.abs(np.where(same, 0.0, a) - np.where(same, 0.0, b))
    if not np.isfinite(error).all():
        return float("inf"), float("inf")
    scale = _scale(np.where(np.isfinite(a), np.abs(a), 0.0))
    return float(error.max()), float((error / scale).max())


def rms(expected: Array, found: Array) -> float:
    """Root mean square of the difference over that of ``expected``; infinite if not finite.

    Of whole numbers, which may be names of classes, it is the share of elements that differ.

    >>> rms(np.array([3.0, 4.0]), np.array([3.0, 9.0]))
    1.0
    """
    if not np.issubdtype(expected.dtype, np.floating):
        return difference(expected, found)[1]
    a, b = expected.astype(np.float64), found.astype(np.float64)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    error = np.where(same, 0.0, a) - np.where(same, 0.0, b)
    if not np.isfinite(error).all():
        return float("inf")
    power = float(np.sum(np.square(np.where(np.isfinite(a), a, 0.0))))
    return float(np.sqrt(np.sum(np.square(error)) / max(power, _SMALLEST_SCALE**2)))


def _scale(magnitude: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Scale of every element's channel; broadcasts against the array."""
    whole = max(float(magnitude.max()), _SMALLEST_SCALE)
    if magnitude.ndim < 3:
        return np.asarray(whole)
    others = (0, *range(2, magnitude.ndim))
    channel: npt.NDArray[np.float64] = magnitude.max(axis=others, keepdims=True)
    return np.minimum(channel + _CHANNEL_FLOOR * whole, whole)


def _paired(
    expected: Mapping[str, Array], found: Mapping[str, Array]
) -> Iterator[tuple[str, Array, Array]]:
    """Match outputs by name where the names agree, else by position."""
    if len(expected) != len(found):
        raise ParityError(
            f"the stages have different outputs: {', '.join(expected)} against {', '.join(found)}"
        )
    by_name = set(expected) == set(found)
    for position, name in enumerate(expected):
        other = found[name] if by_name else list(found.values())[position]
        if expected[name].shape != other.shape:
            raise ParityError(
                f"output {name!r} has shape {expected[name].shape} on one side and "
                f"{other.shape} on the other"
            )
        yield name, expected[name], other


def torch_runner(
    module: nn.Module, names: Sequence[str] = (), output_names: Sequence[str] = ()
) -> Runner:
    """Run a module in eval mode without gradients, on its own device.

    Outputs are named as ``export`` names them.

    Args:
        module: In eval mode; called with one tensor per entry of ``names``.
        names: Input names, in the order of the module's arguments; empty for the names that
            ``export.to_onnx`` gives by itself.
        output_names: Names of the outputs where the export was given some.
    """
    if module.training:
        raise ExportError("parity needs the model in eval mode: call model.eval() first")

    device = device_of(module)

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        order = names or input_names(len(feeds))
        inputs = (torch.from_numpy(feeds[name]).to(device) for name in order)
        with torch.no_grad():
            outputs = flatten(module(*inputs))
        labels = output_names or tuple(outputs)
        arrays = [tensor.detach().cpu().numpy() for tensor in outputs.values()]
        return dict(zip(labels, arrays, strict=True))

    return run


def onnx_runner(path: Path, *, threads: int | None = None) -> Runner:
    """Run an ONNX file with ONNX Runtime on the CPU; inputs are cast to the file's types.

    Args:
        path: The ONNX file.
        threads: Intra-operator threads; as many as torch uses unless told.

    Raises:
        ExportError: ONNX Runtime cannot load the file; later on, it cannot run it on some inputs.
    """
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = torch.get_num_threads() if threads is None else threads
    try:
        session = ort.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load {path}: {error}") from error
    types = {given.name: _dtype(given.type) for given in session.get_inputs()}
    names = [output.name for output in session.get_outputs()]

    def run(feeds: Mapping[str, Array]) -> dict[str, Array]:
        cast = {name: np.asarray(feeds[name]).astype(t, copy=False) for name, t in types.items()}
        try:
            found = session.run(names, cast)
        except Exception as error:  # its exceptions share no base but Exception
            raise ExportError(
                f"ONNX Runtime cannot run {path}: {first_line(error)}; the inputs may not be ones "
                "that the model takes"
            ) from error
        return dict(zip(names, found, strict=True))

    return run


def random_samples(
    path: Path, *, count: int = 1, seed: int = 0, like: Mapping[str, Array] | None = None
) -> list[dict[str, Array]]:
    """Random inputs for an ONNX file, see ``random_inputs``; free dimensions become 2.

    Args:
        path: The ONNX file.
        count: How many.
        seed: Of the generator; the same seed gives the same samples.
        like: Inputs that the model is known to take; all but fractions are taken from it.
    """
    import onnx

    graph = onnx.load(str(path), load_external_data=False).graph
    stored = {tensor.name for tensor in graph.initializer}
    wanted = [_signature(given) for given in graph.input if given.name not in stored]
    generator = np.random.default_rng(seed)
    return [draw(wanted, generator, like) for _ in range(count)]


def as_sample(inputs: Sequence[Tensor], names: Sequence[str] = ()) -> dict[str, Array]:
    """One sample from tensors, named as ``export.to_onnx`` names inputs unless told."""
    order = names or input_names(len(inputs))
    return {n: t.detach().cpu().numpy() for n, t in zip(order, inputs, strict=True)}


def _signature(given: Any) -> tuple[str, list[int], np.dtype[Any]]:
    """Name, shape and type of an input."""
    import onnx

    tensor = given.type.tensor_type
    shape = [d.dim_value if d.HasField("dim_value") else 2 for d in tensor.shape.dim]
    return given.name, shape, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)


def _dtype(kind: str) -> np.dtype[Any]:
    """Map to numpy's type the name of ONNX Runtime's type, ``tensor(float16)`` and the like."""
    inner = kind.removeprefix("tensor(").removesuffix(")")
    return np.dtype({"float": "float32", "double": "float64"}.get(inner, inner))
