"""Linear operators met in a forward pass: what goes in, what comes out, one row per position.

In: an ATen operator and its arguments. Out: a :class:`Contraction`, where the operator is a
convolution or a matrix product by a weight; of it, chosen rows of inputs and outputs. Of a whole
recording: the weights of the last ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from prune2deploy.graph.recording import Recording, refs_in

_ATEN = torch.ops.aten
_LINEAR = {  # operator → where its input, weight and bias are among the arguments
    _ATEN.convolution.default: (0, 1, 2),
    _ATEN.addmm.default: (1, 2, 0),
    _ATEN.mm.default: (0, 1, None),
    _ATEN.linear.default: (0, 1, 2),
}


@dataclass(frozen=True, eq=False)
class Contraction:
    """One call of a linear operator.

    Attributes:
        inputs: What goes in; convolution: (samples, channels, *sides), product: (rows, channels).
        weight: As the operator takes it: a view of a stored tensor, if it is to be corrected.
        bias: Likewise, or ``None``.
        window: Stride, padding, dilation and groups of a convolution; ``None`` for a product.
        turned: Whether the weight is (out, in), so that inputs are multiplied by its transpose.
    """

    inputs: Tensor
    weight: Tensor
    bias: Tensor | None
    window: tuple[Sequence[int], Sequence[int], Sequence[int], int] | None
    turned: bool

    @property
    def channel_dim(self) -> int:
        """Dimension of the output that holds its channels."""
        return -1 if self.window is None else 1

    def output_dim(self, stored: Tensor) -> int | None:
        """Dimension of the stored tensor that makes the outputs; ``None`` where it is not whole."""
        if self.weight.numel() != stored.numel():
            return None
        if self.turned or self.weight.T.is_contiguous():
            return 0
        return 1 if stored.shape == self.weight.shape else None

    def rows_in(self, samples: int, positions: Tensor) -> Tensor:
        """Inputs of each output at some positions.

        Args:
            samples: Number of samples; of a product, each makes rows that follow one another.
            positions: int64 (p,), of the flattened positions of one sample.

        Returns:
            (samples, p, groups, inputs per group).
        """
        if self.window is None:
            flat = self.inputs.reshape(samples, -1, 1, self.inputs.shape[-1])
            return flat[:, positions]
        return _patches(self.inputs, self.weight.shape[2:], self.window, positions)

    def rows_out(self, made: Tensor, samples: int, positions: Tensor) -> Tensor:
        """Outputs at some positions, (samples, p, channels)."""
        if self.window is None:
            return made.reshape(samples, -1, made.shape[-1])[:, positions]
        return made.flatten(2)[:, :, positions].transpose(1, 2)

    def matrices(self) -> Tensor:
        """The weight in double precision, (groups, inputs per group, outputs per group)."""
        groups = 1 if self.window is None else self.window[3]
        weight = self.weight.detach() if self.turned else self.weight.detach().T
        found: Tensor = weight.double().flatten(1).unflatten(0, (groups, -1)).transpose(1, 2)
        return found

    def add(self, change: Tensor) -> None:
        """Add to weight and bias, in place.

        Args:
            change: (groups, inputs per group, outputs per group); one more input where there is
                a bias, which stands for a constant of one.
        """
        if self.bias is not None:
            self.bias.add_(change[:, -1].reshape(self.bias.shape).to(self.bias.dtype))
            change = change[:, :-1]
        by_output = change.transpose(1, 2).flatten(0, 1)  # (outputs, inputs per group)
        shaped = by_output if self.turned else by_output.T
        self.weight.add_(shaped.reshape(self.weight.shape).to(self.weight.dtype))


def contraction(func: Any, args: Sequence[Any]) -> Contraction | None:
    """The linear operator that a call is; ``None`` for others and for transposed convolutions."""
    if func not in _LINEAR:
        return None
    into, weight, bias = _LINEAR[func]
    added = args[bias] if bias is not None and len(args) > bias else None
    if func is not _ATEN.convolution.default:
        return Contraction(
            args[into], args[weight], added, None, turned=func is _ATEN.linear.default
        )
    stride, padding, dilation, transposed, _, groups = args[3:9]
    if transposed:
        return None
    return Contraction(args[into], args[weight], added, (stride, padding, dilation, groups), True)


def last_weights(recording: Recording) -> frozenset[str]:
    """Names of stored tensors that linear operators multiply by which no linear operator follows.

    Those of a classifier, or of the heads of a detector.
    """
    followed: set[int] = set()  # values that a linear operator reads, directly or not
    names: set[str | None] = set()
    for one in reversed(recording.operations):
        read = [ref.number for ref in refs_in((one.args, one.kwargs))]
        linear, leads = one.func in _LINEAR, not followed.isdisjoint(one.outputs)
        if linear and not leads:
            names |= {recording.values[number].weight for number in read}
        if linear or leads:
            followed.update(read)
    return frozenset(name for name in names if name)


def positions_of(call: Contraction, made: Tensor, samples: int) -> int:
    """Number of positions that a call gives an output for in each sample; 0 where uneven."""
    if call.window is not None:
        return math.prod(made.shape[2:]) if len(made) == samples else 0
    rows = math.prod(made.shape[:-1])
    return rows // samples if rows % samples == 0 else 0


def _patches(
    inputs: Tensor,
    kernel: Sequence[int],
    window: tuple[Sequence[int], Sequence[int], Sequence[int], int],
    positions: Tensor,
) -> Tensor:
    """What a convolution sees at some of its positions, in the order of its weights."""
    stride, padding, dilation, groups = window
    around = list(itertools.chain.from_iterable((p, p) for p in reversed(padding)))
    padded = functional.pad(inputs, around)
    sides = padded.shape[2:]
    counts = [
        (side - d * (k - 1) - 1) // s + 1
        for side, k, s, d in zip(sides, kernel, stride, dilation, strict=True)
    ]
    places = torch.unravel_index(positions, counts)
    taps = torch.unravel_index(torch.arange(math.prod(kernel), device=inputs.device), list(kernel))
    flat = torch.zeros(1, 1, dtype=torch.int64, device=inputs.device)
    for place, tap, side, s, d in zip(places, taps, sides, stride, dilation, strict=True):
        flat = flat * side + place[:, None] * s + tap[None, :] * d
    seen = padded.flatten(2)[:, :, flat.flatten()]  # (samples, channels, p * taps)
    seen = seen.unflatten(2, flat.shape).unflatten(1, (groups, -1))  # samples, g, c, p, taps
    rows: Tensor = seen.permute(0, 3, 1, 2, 4).flatten(3)
    return rows
