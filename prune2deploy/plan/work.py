"""How much work an operator does, as formulas of axis widths; its time is fitted on that.

In: the kind of an operator and its shapes, every dimension a formula. Out: multiply-accumulates,
elements read and elements written, and a signature that says which operators may share costs.
No times here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prune2deploy.graph.axes import Polynomial
from prune2deploy.timing import Shape

Form = tuple[Polynomial, ...]
"""The shape of a tensor with one formula per dimension."""

_CONVOLUTIONS = ("conv",)
_PRODUCTS = ("gemm", "matmul", "fullyconnected", "innerproduct", "linear", "attention", "einsum")
_TRANSPOSED = ("transpose", "deconv", "backprop")


@dataclass(frozen=True)
class Work:
    """What one call of an operator has to do.

    Attributes:
        macs: Multiply-accumulates; the zero polynomial for operators bound by memory.
        read: Activation elements read (weights not counted).
        written: Elements written.
    """

    macs: Polynomial
    read: Polynomial
    written: Polynomial

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes that the work depends on."""
        return self.macs.axes | self.read.axes | self.written.axes


NOTHING = Polynomial.constant(0)
NO_WORK = Work(NOTHING, NOTHING, NOTHING)
"""What an operator does whose time depends on no axis."""


def is_convolution(kind: str) -> bool:
    """Whether a runtime's operator type is a convolution (which runs in channel blocks)."""
    return any(word in kind.lower() for word in _CONVOLUTIONS)


def contracts(kind: str) -> bool:
    """Whether a runtime's operator type sums over channels (convolution, matrix product)."""
    return is_convolution(kind) or any(word in kind.lower() for word in _PRODUCTS)


def is_transposed(kind: str) -> bool:
    """Whether a convolution is a transposed one, whose weight lists its inputs first."""
    return is_convolution(kind) and any(word in kind.lower() for word in _TRANSPOSED)


def weight_position(kind: str, inputs: Sequence[Shape], outputs: Sequence[Shape]) -> int | None:
    """Index of the weight among the inputs of a convolution, ``None`` if the runtime hides it."""
    if not is_convolution(kind) or len(inputs) < 2 or not outputs:
        return None
    data, weight, made = inputs[0], inputs[1], outputs[0]
    if len(weight) != len(data) or len(made) < 3:
        return None
    expected = data[1] if is_transposed(kind) else made[1]
    return 1 if weight[0] == expected else None


def channel_dim(kind: str, shape: Shape) -> int:
    """The dimension of an activation that holds the channels of a contraction."""
    return 1 if is_convolution(kind) and len(shape) > 2 else len(shape) - 1


def total(form: Form) -> Polynomial:
    """Number of elements of a tensor."""
    product = Polynomial.constant(1)
    for dim in form:
        product = product * dim
    return product


def work_of(
    kind: str,
    inputs: Sequence[Form],
    outputs: Sequence[Form],
    weight: int | None,
    layer: Work | None,
) -> Work:
    """Derive the work of an operator from its symbolic shapes.

    Args:
        kind: Operator type as the runtime calls it.
        inputs: Symbolic shapes of the inputs.
        outputs: Symbolic shapes of the outputs.
        weight: Position of the weight among the inputs, where the runtime lists it.
        layer: Work of the layer of the graph that the operator was matched to, if any; its
            multiply-accumulates are used where the runtime hides the weight.
    """
    written = _sum(total(form) for form in outputs)
    if not contracts(kind) or not inputs or not outputs:
        return Work(NOTHING, _sum(total(form) for form in inputs), written)
    if weight is not None:
        positions = inputs[0][2:] if is_transposed(kind) else outputs[0][2:]
        macs = total(inputs[weight]) * total(positions) * outputs[0][0]
        data = [form for i, form in enumerate(inputs) if i == 0 or len(form) == len(outputs[0])]
        data = [form for form in data if form is not inputs[weight]]
        return Work(macs, _sum(total(form) for form in data), written)
    read = _sum(total(form) for form in inputs)
    if layer is not None:
        return Work(layer.macs, read, written)
    rank = tuple(1 for _ in inputs[0])
    contracted = inputs[0][channel_dim(kind, rank)] if rank else Polynomial.constant(1)
    return Work(written * contracted, read, written)


def signature(kind: str, inputs: Sequence[Form], outputs: Sequence[Form]) -> str:
    """Text that operators of equal cost per unit of work have in common.

    Dimensions that pruning changes are written ``*``; everything else (kernel, feature map,
    batch, fixed channels, number of inputs) must be equal.
    """
    shapes = (
        "x".join("*" if dim.axes else str(dim({})) for dim in form) for form in (*inputs, *outputs)
    )
    return f"{kind}({','.join(shapes)})"


def _sum(parts: Iterable[Polynomial]) -> Polynomial:
    return sum(parts, NOTHING)
