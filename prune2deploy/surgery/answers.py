"""Does the code of a model read values that depend on its input?

In: a model and its recording. Out: nothing, or an error. Code may ask a tensor for a number
(``float(x.max())``, ``if x.mean() > 0``). A captured graph has the answers of the example in it,
which is right for tables and settings and wrong for whatever follows the input. Where there are
such questions, the original runs again: on the example, on its floating-point values in another
order, and mirrored within their range. The answers are compared. Whole numbers (token ids, masks)
stay as they are.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.errors import PruneError
from prune2deploy.graph.calling import map_tensors, quiet, run
from prune2deploy.graph.recording import Recording
from prune2deploy.graph.visible import LEAVE

Answer = tuple[str, Any]


class FollowsInput(PruneError):  # noqa: N818  reads as the reason it is
    """Code reads values that depend on the input, so that it cannot be captured."""


def check_answers(source: nn.Module, recording: Recording) -> None:
    """Raise FollowsInput if the code reads values that depend on the input."""
    asked = [op for op in recording.operations if not op.outputs and op.name != LEAVE]
    if recording.on_shapes or not asked:  # shapes alone decided what the code does
        return
    first = _answers(source, recording, recording.example)
    for change in (_shuffled, _mirrored):
        other = _answers(source, recording, map_tensors(recording.example, change))
        for place, pair in enumerate(zip(first, other, strict=False)):
            if not _same(*pair):
                at = asked[place].scope if len(first) == len(asked) else ""
                raise _refusal(at or type(source).__name__, *pair)


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
        with quiet(source), watch:
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
    """The same values in another order."""
    if not _may_change(tensor):
        return tensor
    dice = torch.Generator().manual_seed(0)
    order = torch.randperm(tensor.numel(), generator=dice).to(tensor.device)
    return tensor.detach().flatten()[order].view(tensor.shape)


def _mirrored(tensor: torch.Tensor) -> torch.Tensor:
    """The least value for the greatest, and so on."""
    return tensor.amax() + tensor.amin() - tensor.detach() if _may_change(tensor) else tensor


def _may_change(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_meta and tensor.numel() > 0
