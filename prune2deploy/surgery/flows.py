"""How a factor passes back through operators, from their results to their arguments.

``FLOWS`` names the operators through which it passes. Each is linear in the arguments that take the
factor to the result together.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from prune2deploy.graph.recording import Operation, Ref

Wanted = Tensor
"""bool (2, *shape): the entries that are wanted as they are, and those wanted multiplied."""

AS_IT_IS, MULTIPLIED = 0, 1
Shape = tuple[int, ...]
Back = Callable[[Operation, str, list[Wanted], list[Shape]], list[Wanted]]
"""Operator, argument, what is wanted of results, shapes of the argument's tensors → of these."""


@dataclass(frozen=True)
class Flow:
    """One operator.

    Attributes:
        back: From what is wanted of results to what is wanted of one argument.
        groups: Names of arguments; one of each group takes the factor to the result.
        where_given: Arguments that do so too unless they are left out.
        unless: Arguments with which it does not pass.
        moves: Whether each entry of the results is an entry of the arguments.
    """

    back: Back
    groups: tuple[tuple[str, ...], ...]
    where_given: tuple[str, ...] = ()
    unless: tuple[str, ...] = ()
    moves: bool = False

    def results(self, operation: Operation) -> tuple[int, ...]:
        """The results that the factor reaches; others are by-products."""
        return operation.outputs if self.moves else operation.outputs[:1]


def anywhere(mask: Tensor, dim: int, *, keepdim: bool = False) -> Tensor:
    """Where ``mask`` (bool) is true anywhere along a dimension; many times as fast as ``any``."""
    if not mask.numel():
        return mask.any(dim, keepdim=keepdim)
    return mask.view(torch.uint8).amax(dim, keepdim=keepdim).view(torch.bool)


def _same(_: Operation, __: str, results: list[Wanted], ___: list[Shape]) -> list[Wanted]:
    return results


def _reshaped(_: Operation, __: str, results: list[Wanted], shapes: list[Shape]) -> list[Wanted]:
    return [results[0].reshape(2, *shapes[0])]


def _viewed(
    operation: Operation, _: str, results: list[Wanted], shapes: list[Shape]
) -> list[Wanted]:
    """Results are views of the argument: writing into views of what is wanted writes into that."""
    found = torch.zeros(2, *shapes[0], dtype=torch.bool)
    for kind in (AS_IT_IS, MULTIPLIED):
        views = operation.func(found[kind], *operation.args[1:], **operation.kwargs)
        for view, want in zip(
            [views] if isinstance(views, Tensor) else views, results, strict=True
        ):
            view.bitwise_or_(want[kind])
    return [found]


def _moved(
    operation: Operation, _: str, results: list[Wanted], shapes: list[Shape]
) -> list[Wanted]:
    """Where each entry went shows when the operator runs on the numbers of the entries."""
    starts = [0]
    for shape in shapes:
        starts.append(starts[-1] + math.prod(shape))
    rest = [torch.arange(lo, hi) for lo, hi in itertools.pairwise(starts)]
    numbers = [part.view(shape) for part, shape in zip(rest, shapes, strict=True)][::-1]
    args, kwargs = tree_map_only(Ref, lambda _: numbers.pop(), (operation.args, operation.kwargs))
    went = operation.func(*args, **kwargs)
    flat = torch.zeros(2, starts[-1], dtype=torch.bool)
    for want, places in zip(results, [went] if isinstance(went, Tensor) else went, strict=True):
        for kind in (AS_IT_IS, MULTIPLIED):
            flat[kind, places[want[kind]]] = True
    parts = flat.split([math.prod(shape) for shape in shapes], dim=1)
    return [part.view(2, *shape) for part, shape in zip(parts, shapes, strict=True)]


def _broadcast(_: Operation, __: str, results: list[Wanted], shapes: list[Shape]) -> list[Wanted]:
    return [_folded(results[0], shapes[0])]


def _folded(want: Wanted, shape: Shape) -> Wanted:
    """What is wanted of a tensor of which the result is a broadcast form."""
    lead = want.dim() - 1 - len(shape)
    want = anywhere(want.flatten(1, lead), 1) if lead else want
    for dim, size in enumerate(shape, start=1):
        if size == 1:
            want = anywhere(want, dim, keepdim=True)
    return want


def _rows(_: Operation, __: str, results: list[Wanted], shapes: list[Shape]) -> list[Wanted]:
    """Rows of a weight, or entries of a bias, make the last dimension."""
    return [_of_rows(_folded(results[0], tuple(results[0].shape[-1:])), shapes[0])]


def _channels(_: Operation, __: str, results: list[Wanted], shapes: list[Shape]) -> list[Wanted]:
    """Likewise the dimension after the batch."""
    return [_of_rows(anywhere(results[0].movedim(2, 1).flatten(2), 2), shapes[0])]


def _of_rows(want: Wanted, shape: Shape) -> Wanted:
    return want.view(2, -1, *[1] * (len(shape) - 1)).expand(2, *shape)


def _columns(_: Operation, __: str, results: list[Wanted], shapes: list[Shape]) -> list[Wanted]:
    """Columns of a table whose rows are picked."""
    return [_folded(results[0], tuple(results[0].shape[-1:]))[:, None].expand(2, *shapes[0])]


def _matrices(
    operation: Operation, name: str, results: list[Wanted], shapes: list[Shape]
) -> list[Wanted]:
    """Either factor of a matrix product, or what is added to it."""
    if name in ("mat2", "batch2"):
        return [anywhere(results[0], -2, keepdim=True).expand(2, *shapes[0])]
    if name in ("mat1", "batch1") or operation.name in ("aten::mm", "aten::bmm"):
        return [anywhere(results[0], -1, keepdim=True).expand(2, *shapes[0])]
    return [_folded(results[0], shapes[0])]


def _as_pairs(_: Operation, __: str, results: list[Wanted], ___: list[Shape]) -> list[Wanted]:
    """Complex numbers that are read as pairs."""
    return [anywhere(results[0], -1)]


def _from_pairs(_: Operation, __: str, results: list[Wanted], ___: list[Shape]) -> list[Wanted]:
    """Pairs that are read as complex numbers."""
    return [results[0][..., None].expand(*results[0].shape, 2)]


_RESHAPING = ("view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy")
_VIEWING = (
    "split", "split_with_sizes", "chunk", "unbind", "slice", "select", "t", "transpose", "permute",
    "squeeze", "unsqueeze",
)  # fmt: skip
_MOVING = ("unsafe_split", "unsafe_split_with_sizes", "repeat", "roll", "flip")
_COPYING = ("clone", "detach", "alias", "lift_fresh", "_to_copy")
_ONE = (("self",),)
_WEIGHT = (("weight",),)
_KINDS: tuple[tuple[tuple[str, ...], Flow], ...] = (
    (_RESHAPING, Flow(_reshaped, _ONE, unless=("dtype",), moves=True)),
    (_VIEWING, Flow(_viewed, _ONE, moves=True)),
    (("expand",), Flow(_broadcast, _ONE, moves=True)),
    (_MOVING, Flow(_moved, _ONE, moves=True)),
    (("cat", "stack"), Flow(_moved, (("tensors",),), moves=True)),
    (_COPYING, Flow(_same, _ONE, moves=True)),
    (("view_as_real",), Flow(_as_pairs, _ONE)),
    (("view_as_complex",), Flow(_from_pairs, _ONE)),
    (("neg",), Flow(_same, _ONE)),
    (("add", "sub"), Flow(_broadcast, (("self",), ("other",)))),
    (("mul",), Flow(_broadcast, (("self", "other"),))),
    (("div",), Flow(_broadcast, _ONE, unless=("rounding_mode",))),
    (("mm", "bmm"), Flow(_matrices, (("mat2", "self"),))),
    (("addmm",), Flow(_matrices, (("self",), ("mat2", "mat1")))),
    (("baddbmm",), Flow(_matrices, (("self",), ("batch2", "batch1")))),
    (("linear",), Flow(_rows, _WEIGHT, ("bias",))),
    (("convolution", "_convolution"), Flow(_channels, _WEIGHT, ("bias",), ("transposed",))),
    (("embedding",), Flow(_columns, _WEIGHT)),
    (("native_layer_norm", "_fused_rms_norm", "rms_norm"), Flow(_broadcast, _WEIGHT, ("bias",))),
    (
        ("native_group_norm", "native_batch_norm", "_native_batch_norm_legit_no_training"),
        Flow(_channels, _WEIGHT, ("bias",)),
    ),
    (("_weight_norm_interface", "_weight_norm"), Flow(_broadcast, (("g",),))),
)

FLOWS: dict[str, Flow] = {
    "prune2deploy::dropout": Flow(_same, _ONE, moves=True),
    **{f"aten::{name}": flow for names, flow in _KINDS for name in names},
}
"""Operator → how a factor passes."""
