"""Shapes of what the most frequent operators return, by hand.

PyTorch can tell the shape of any result (the ``meta`` device), but for norms, activations and
contractions it takes as long as it takes to compute them on a small model. A function here takes
an operator's arguments and returns the form of its result, or of each; ``None`` where the
arguments are of a kind that it does not cover, so that PyTorch is asked. Arguments that do not
fit together raise ``ValueError``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from prune2deploy.graph import visible  # noqa: F401  defines an operator

aten = torch.ops.aten


class Form(NamedTuple):
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype


Kernel = Callable[..., "Form | list[Form] | None"]
K = TypeVar("K", bound=Kernel)
KERNELS: dict[Any, Kernel] = {}


def kernel(*operators: Any) -> Callable[[K], K]:
    """Enter a function in the table under some overloads."""

    def add(function: K) -> K:
        KERNELS.update(dict.fromkeys(operators, function))
        return function

    return add


def contiguous(shape: Sequence[int], dtype: torch.dtype) -> Form:
    """Row-major form."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return Form(tuple(shape), tuple(reversed(strides)), dtype)


def _like(x: Tensor) -> Form | None:
    """The form of an element-wise result of one floating-point tensor without holes."""
    if not x.dtype.is_floating_point or not _dense(x):
        return None
    return Form(tuple(x.shape), x.stride(), x.dtype)


def _dense(x: Tensor) -> bool:
    """Whether the elements fill their memory, in whatever order."""
    if x.is_contiguous():
        return True
    step = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size != 1 and stride != step:
            return False
        step *= size
    return True


def _fit(holds: bool, what: str, *tensors: Any) -> None:
    if not holds:
        shapes = [tuple(t.shape) if isinstance(t, Tensor) else t for t in tensors]
        raise ValueError(f"{what}: {shapes}")


@kernel(
    aten.relu.default, aten.relu_.default, aten.gelu.default, aten.silu.default,
    aten.silu_.default, aten.sigmoid.default, aten.sigmoid_.default, aten.tanh.default,
    aten.hardswish.default, aten.hardswish_.default, aten.hardsigmoid.default,
    aten.hardsigmoid_.default, aten.hardtanh.default, aten.hardtanh_.default,
    aten.leaky_relu.default, aten.leaky_relu_.default, aten.exp.default, aten.rsqrt.default,
    aten.neg.default,
)  # fmt: skip
def unary(x: Tensor, *_: Any, **__: Any) -> Form | None:
    """Element-wise on one tensor."""
    return _like(x)


@kernel(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor)
def binary(x: Any, y: Any, **_: Any) -> Form | None:
    """Element-wise on two tensors, or on a tensor and a real number."""
    if isinstance(x, Tensor) and isinstance(y, int | float):
        return _like(x)
    if not (isinstance(x, Tensor) and isinstance(y, Tensor)) or x.dtype != y.dtype:
        return None
    if x.shape == y.shape and x.stride() == y.stride():
        return _like(x)
    if not x.dtype.is_floating_point or not (x.is_contiguous() and y.is_contiguous()):
        return None
    return contiguous(_broadcast(tuple(x.shape), tuple(y.shape)), x.dtype)


@kernel(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor)
def binary_in_place(x: Any, y: Any, **_: Any) -> Form | None:
    """Element-wise, written to the first."""
    form = binary(x, y)
    _fit(form is None or form.shape == tuple(x.shape), "the result does not fit in place", x, y)
    return form


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    rank = max(len(a), len(b))
    a, b = (1,) * (rank - len(a)) + a, (1,) * (rank - len(b)) + b
    for m, n in zip(a, b, strict=True):
        _fit(m == n or 1 in (m, n), "shapes do not broadcast", a, b)
    return tuple(n if m == 1 else m for m, n in zip(a, b, strict=True))


@kernel(aten.convolution.default)
def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *settings: Any) -> Form | None:
    """Convolution of row-major tensors, of any rank."""
    transposed, groups = settings[3], settings[5]
    rank = weight.dim() - 2
    if x.dim() != rank + 2 or x.dtype != weight.dtype or 0 in x.shape:
        return None
    if not (x.is_contiguous() and weight.is_contiguous()):
        return None
    rows, columns = weight.shape[:2]
    used, made = (rows, columns * groups) if transposed else (columns * groups, rows)
    fits = x.shape[1] == used and rows % groups == 0
    _fit(fits, "input and weight of a convolution", x, weight, groups)
    _fit(bias is None or tuple(bias.shape) == (made,), "bias of a convolution", bias, made)
    space = [_convolved(x.shape[2 + n], weight.shape[2 + n], n, settings) for n in range(rank)]
    _fit(min(space, default=1) > 0, "the kernel is larger than the input", x, weight)
    return contiguous((x.shape[0], made, *space), x.dtype)


def _convolved(size: int, taps: int, place: int, settings: Sequence[Any]) -> int:
    """Positions of a dimension that a kernel of so many taps makes of so many."""
    stride, padding, dilation, transposed, output_padding, _groups = settings
    step, border, spread = (s[place % len(s)] for s in (stride, padding, dilation))
    reach = spread * (taps - 1)
    if transposed:
        extra = output_padding[place % len(output_padding)]
        return int((size - 1) * step - 2 * border + reach + extra + 1)
    return int((size + 2 * border - reach - 1) // step + 1)


@kernel(aten.native_batch_norm.default)
def batch_norm(x: Tensor, *settings: Any) -> list[Form] | None:
    """Batch normalisation on CPU, which returns statistics in training only."""
    form = _like(x)
    given = [t for t in settings[:4] if t is not None]
    training = settings[4]
    if form is None or x.dim() < 2 or any(t.dtype != x.dtype for t in given):
        return None
    if x.device.type != "cpu":
        return None
    channels = x.shape[1]
    _fit(all(tuple(t.shape) == (channels,) for t in given), "batch normalisation", x, *given)
    statistics = contiguous((channels if training else 0,), x.dtype)
    return [form, statistics, statistics]


@kernel(aten.native_layer_norm.default)
def layer_norm(
    x: Tensor, shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, *_: Any
) -> list[Form] | None:
    """Layer normalisation."""
    given = [t for t in (weight, bias) if t is not None]
    if not x.dtype.is_floating_point or any(t.dtype != x.dtype for t in given):
        return None
    shape = tuple(shape)
    fits = tuple(x.shape[-len(shape) :]) == shape and all(tuple(t.shape) == shape for t in given)
    _fit(fits, "layer normalisation", x, shape, *given)
    statistics = contiguous((*x.shape[: -len(shape)], *(1 for _ in shape)), x.dtype)
    return [contiguous(x.shape, x.dtype), statistics, statistics]


@kernel(aten.mm.default, aten.bmm.default)
def matmul(a: Tensor, b: Tensor) -> Form | None:
    """Matrix product, of a batch or not."""
    if a.dtype != b.dtype:
        return None
    fits = a.dim() == b.dim() and a.shape[:-2] == b.shape[:-2] and a.shape[-1] == b.shape[-2]
    _fit(fits, "factors of a matrix product", a, b)
    return contiguous((*a.shape[:-1], b.shape[-1]), a.dtype)


@kernel(aten.addmm.default, aten.baddbmm.default)
def add_matmul(bias: Tensor, a: Tensor, b: Tensor, **_: Any) -> Form | None:
    """Matrix product plus what broadcasts to it."""
    form = matmul(a, b)
    if form is None or bias.dtype != form.dtype:
        return None
    _fit(_broadcast(form.shape, tuple(bias.shape)) == form.shape, "addend of a product", bias, form)
    return form


@kernel(aten._softmax.default, aten._log_softmax.default)
def softmax(x: Tensor, dim: int, to_float: bool) -> Form | None:
    """Softmax of a row-major tensor."""
    if to_float or not x.is_contiguous() or not -x.dim() <= dim < max(x.dim(), 1):
        return None
    return _like(x)


@kernel(aten.mean.dim)
def mean(
    x: Tensor, dims: Sequence[int] | None, keepdim: bool = False, *, dtype: Any = None
) -> Form | None:
    """Mean of a row-major tensor over some dimensions."""
    if not dims or dtype is not None or not x.is_contiguous() or not x.dtype.is_floating_point:
        return None
    rank = x.dim()
    _fit(all(-rank <= dim < rank for dim in dims), "dimensions of a mean", x, tuple(dims))
    gone = {dim % rank for dim in dims}
    sizes = ((1 if place in gone else n) for place, n in enumerate(x.shape))
    left = tuple(n for place, n in enumerate(sizes) if keepdim or place not in gone)
    return contiguous(left, x.dtype)


@kernel(aten.cat.default)
def cat(tensors: Sequence[Tensor], dim: int = 0) -> Form | None:
    """Concatenation of row-major tensors."""
    first = tensors[0]
    rank = first.dim()
    plain = all(t.dtype == first.dtype and t.is_contiguous() and t.dim() == rank for t in tensors)
    if not plain or not -rank <= dim < rank:
        return None
    dim %= rank
    for other in tensors:
        same = _without(other.shape, dim) == _without(first.shape, dim)
        _fit(same, "parts of a concatenation", first, other)
    total = sum(t.shape[dim] for t in tensors)
    return contiguous((*first.shape[:dim], total, *first.shape[dim + 1 :]), first.dtype)


def _without(shape: Iterable[int], dim: int) -> list[int]:
    return [n for place, n in enumerate(shape) if place != dim]


@kernel(aten.masked_fill.Scalar)
def masked_fill(x: Tensor, mask: Tensor, _: Any) -> Form | None:
    """Overwrite where a mask says so."""
    if not (x.is_contiguous() and mask.is_contiguous()) or mask.dtype != torch.bool:
        return None
    return contiguous(_broadcast(tuple(x.shape), tuple(mask.shape)), x.dtype)


@kernel(aten.roll.default)
def roll(x: Tensor, *_: Any) -> Form | None:
    """Positions moved round in a row-major tensor."""
    return contiguous(x.shape, x.dtype) if x.is_contiguous() else None


@kernel(aten._unsafe_view.default)
def unsafe_view(x: Tensor, sizes: Sequence[int]) -> Form | None:
    """A view of a row-major tensor that nothing else uses."""
    if not x.is_contiguous() or -1 in sizes:
        return None
    _fit(math.prod(sizes) == x.numel(), "a view of another size", x, tuple(sizes))
    return contiguous(sizes, x.dtype)


@kernel(torch.ops.prune2deploy.attention.default)
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *_: Any, **__: Any
) -> Form | None:
    """Fused attention on CPU: the result lies in memory as the queries do."""
    form = _like(q)
    if form is None or q.dim() != 4 or not (q.dtype == k.dtype == v.dtype == torch.float32):
        return None
    if not q.stride(-1) == k.stride(-1) == v.stride(-1) == 1:
        return None  # computed by smaller operators
    batch, heads, rows, width = q.shape
    if k.shape != v.shape or (*k.shape[:2], k.shape[3]) != (batch, heads, width):
        return None
    if mask is not None:
        logits = (batch, heads, rows, k.shape[2])
        fits = _broadcast(tuple(mask.shape), logits) == logits
        _fit(fits, "mask of an attention", mask, logits)
    return form
