"""Dropout that is called as a function leaves no trace in evaluation mode; here it does.

In: calls of ``torch.nn.functional.dropout`` and its kin while the mode below is active. Out: one
recorded operator each, which does nothing, but knows the kind and the probability, so that a
captured module can drop again when it trains. (Calls with a probability of zero stay unseen: code
that passes ``p if self.training else 0`` does not tell its probability in evaluation.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_LIBRARY = torch.library.Library("prune2deploy", "FRAGMENT")
_LIBRARY.define("dropout(Tensor(a) self, float p, str kind) -> Tensor(a)")


@torch.library.impl(_LIBRARY, "dropout", "CompositeExplicitAutograd")
def _nothing(self: Tensor, p: float, kind: str) -> Tensor:
    same: Tensor = torch.ops.aten.alias.default(self)
    return same


KINDS: dict[Any, str] = {
    F.dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
}
"""Function → its name in ``torch.nn.functional``; all have the same signature."""


class VisibleDropout(TorchFunctionMode):
    """Calls ``prune2deploy::dropout`` where a function is told not to drop."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch; idle dropout becomes an operator."""
        settings = kwargs or {}
        kind = KINDS.get(func)  # these hand on their settings by keyword
        if kind is not None and settings["p"] and not settings["training"]:
            return torch.ops.prune2deploy.dropout(args[0], settings["p"], kind)
        return func(*args, **settings)
