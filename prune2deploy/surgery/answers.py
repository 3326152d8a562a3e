"""Does the code of a model read values that depend on its input?

In: a model and its recording. Out: nothing, or an error. A captured graph has what code was
answered for the example in it, which is right for tables and settings and wrong for whatever
follows the input. Code may ask a tensor for a number (``float(x.max())``, ``if x.mean() > 0``):
where it does, the original runs again on the example and on two other inputs, and the answers are
compared. In one, floating-point values are in another order, and the samples of whole numbers
(token ids, masks) are. In the other, floating-point values are mirrored into the inner part of
their range, where every model takes them, so that no statistic of them stays. Code may also hand
values to NumPy or put them in a list: what is computed from the input must not leave this way. Nor
may it draw numbers from a generator of its own, which recorded operators cannot follow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import map_tensors, run, untouched
from prune2deploy.graph.following import followers
from prune2deploy.graph.recording import Operation, Recording
from prune2deploy.graph.visible import LEAVE

Answer = tuple[str, Any]


class FollowsInput(PruneError):  # noqa: N818  reads as the reason it is
    """Code reads values that depend on the input, so that it cannot be captured."""


def check_answers(source: nn.Module, recording: Recording, removed: Sequence[str] = ()) -> None:
    """Raise FollowsInput if the code reads values that depend on the input.

    Args:
        source: The original module.
        recording: Its recording.
        removed: Names of the blocks that the captured graph is without.

    Raises:
        PruneError: Likewise if the code draws random numbers from a generator of its own.
    """
    operations = recording.without(removed)
    for operation in operations:
        if any(
            isinstance(a, torch.Generator) for a in (*operation.args, *operation.kwargs.values())
        ):
            raise _drawn(operation)
    for operation in followers(operations, recording.inputs).questions:
        if operation.name == LEAVE:
            raise _left(operation)
    if recording.missed:
        raise _missed(source, recording.missed)
    asked = [op for op in recording.operations if not op.outputs and op.name != LEAVE]
    if not asked or (
        recording.on_shapes and not followers(recording.operations, _whole(recording)).questions
    ):
        return
    first = _answers(source, recording, recording.example)
    for change in (_shuffled, _mirrored):
        other = _answers(source, recording, map_tensors(recording.example, change))
        for place, pair in enumerate(zip(first, other, strict=False)):
            if not _same(*pair):
                at = asked[place].scope if len(first) == len(asked) else ""
                raise _refusal(at or type(source).__name__, *pair)


def _missed(source: nn.Module, names: Sequence[str]) -> FollowsInput:
    return FollowsInput(
        f"the code of {type(source).__name__} reads values that depend on the input, and for the "
        f"example leaves {len(names)} parameters out ({names[0]}), while it holds widths as "
        "constants, so that recorded operators would have to stand for it; they would leave them "
        "out for every input. Trace with an example that uses all, or take widths from shapes"
    )


def _whole(recording: Recording) -> list[int]:
    """The inputs that have values in a pass on shapes: those that are not floating-point."""
    kinds = {number: recording.values[number].dtype for number in recording.inputs}
    return [n for n, kind in kinds.items() if kind is not None and not kind.is_floating_point]


def _drawn(operation: Operation) -> PruneError:
    return PruneError(
        f"{operation.scope or 'the model'} draws random numbers from a torch.Generator, while its "
        "code holds widths as constants, so that recorded operators would have to stand for it; "
        "they cannot follow the generator. Draw without one (torch.manual_seed makes that repeat), "
        "keep the numbers in a buffer, or take widths from shapes"
    )


def _left(operation: Operation) -> FollowsInput:
    return FollowsInput(
        f"{operation.scope or 'the model'} hands values to {operation.args[1]}, and what is "
        "computed there cannot be seen, while its code holds widths as constants, so that it "
        "would have to be. Compute it with torch, make it an operator (torch.library.custom_op), "
        "or give the module a rule (docs/pruning.md)"
    )


def _refusal(where: str, one: Answer, other: Answer) -> FollowsInput:
    return FollowsInput(
        f"the code of {where} reads the value of a tensor that depends on the input ({one[1]} for "
        f"one input, {other[1]} for another), and holds widths as constants elsewhere, so that "
        "recorded operators would have to stand for it; they would repeat one answer. Keep the "
        "value in a tensor (x / x.max(), torch.where), or take widths from shapes"
    )


class _Answers(TorchDispatchMode):
    """Lists what operators answer that return no tensor."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.given: list[Answer] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, bool | int | float | complex):
            self.given.append((func._schema.name, result))
        return result


def _answers(source: nn.Module, recording: Recording, example: Any) -> list[Answer]:
    watch = _Answers()
    try:
        with untouched(source), watch:
            run(source, example, recording.forward_fn)
    except Exception:  # noqa: BLE001  a model may refuse the shuffled input; what it asked counts
        return watch.given
    return watch.given


def _same(one: Answer, other: Answer) -> bool:
    """Whether two answers agree, rounding aside: sums depend on the order of what is added."""
    return one == other or (
        isinstance(one[1], float)
        and isinstance(other[1], float)
        and math.isclose(one[1], other[1], rel_tol=1e-5, abs_tol=1e-9)
    )


def _shuffled(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in another order; of anything but floating-point values, the samples."""
    if tensor.layout != torch.strided or tensor.is_meta or not tensor.numel() or not tensor.dim():
        return tensor
    if not tensor.is_floating_point():
        return tensor.flip(0)
    dice = torch.Generator().manual_seed(0)
    order = torch.randperm(tensor.numel(), generator=dice).to(tensor.device)
    return tensor.detach().flatten()[order].view(tensor.shape)


def _mirrored(tensor: torch.Tensor) -> torch.Tensor:
    """Low values for high ones, within part of their range; infinite ones stay.

    Where all values are the same they become different ones, nearer to zero; above it where they
    are zero.
    """
    given = tensor.detach()
    if tensor.is_meta or not tensor.is_floating_point() or not given.isfinite().any():
        return tensor
    finite = given.isfinite()
    low, high = given[finite].aminmax()
    if low == high:
        ramp = torch.linspace(0.5, 0.75, given.numel(), dtype=given.dtype, device=given.device)
        changed = ramp.view(given.shape) * (low if low else 1)
    else:
        changed = low + (high - low) / 8 + (high - given) / 2
    return torch.where(finite, changed, given)
