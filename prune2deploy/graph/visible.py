"""What a model does beside torch's operators, made visible as operators.

In: calls of functions while the modes below are active. Out: recorded operators, each of which
changes nothing. Fused attention becomes one operator, whatever torch makes of it on a device, for a
type and with a mask. Two kinds of calls leave no trace by themselves. Dropout that is called as a
function does nothing in evaluation mode; it becomes an operator that knows the kind and the
probability, so that a captured module can drop again when it trains. (Calls with a probability of
zero stay unseen: code that passes ``p if self.training else 0`` does not tell its probability in
evaluation.) And values that are handed to NumPy or put in a list are lost from sight: what is
computed there would pass for a constant.

``Watch`` shows operators as they run. Code that enters inference mode by itself would run some
whole that torch takes apart elsewhere; they are taken apart for it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_LIBRARY = torch.library.Library("prune2deploy", "FRAGMENT")
_LIBRARY.define("dropout(Tensor(a) self, float p, str kind) -> Tensor(a)")
_LIBRARY.define("leave(Tensor self, str how) -> ()")
_LIBRARY.define(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask=None, "
    "float dropout_p=0.0, bool is_causal=False, *, float? scale=None, bool enable_gqa=False) "
    "-> Tensor"
)

LEAVE = "prune2deploy::leave"
ATTENTION = "prune2deploy::attention"


@torch.library.impl(_LIBRARY, "dropout", "CompositeExplicitAutograd")
def _nothing(self: Tensor, p: float, kind: str) -> Tensor:
    same: Tensor = torch.ops.aten.alias.default(self)
    return same


@torch.library.impl(_LIBRARY, "leave", "CompositeExplicitAutograd")
def _leave(self: Tensor, how: str) -> None:
    return None


@torch.library.impl(_LIBRARY, "attention", "CompositeExplicitAutograd")
def _attention(*args: Any, **settings: Any) -> Tensor:
    return F.scaled_dot_product_attention(*args, **settings)


def _attends(func: Any, args: tuple[Any, ...], settings: dict[str, Any]) -> bool:
    """Whether it is fused attention of as many queries, keys and values, but for shared heads."""
    if func is not F.scaled_dot_product_attention:
        return False
    named = map(settings.get, ("query", "key", "value"))
    q, k, v = [tensor for tensor in (*args, *named) if tensor is not None][:3]
    if q.dim() < 3 or any(map(stands_in, (q, k, v))):
        return False
    alike = 3 if settings.get("enable_gqa") else 2
    return bool(q.shape[:-alike] == k.shape[:-alike] and k.shape[:-2] == v.shape[:-2])


KINDS: dict[Any, str] = {
    F.dropout: "dropout",
    F.dropout1d: "dropout1d",
    F.dropout2d: "dropout2d",
    F.dropout3d: "dropout3d",
    F.alpha_dropout: "alpha_dropout",
    F.feature_alpha_dropout: "feature_alpha_dropout",
}
"""Function → its name in ``torch.nn.functional``; all have the same signature."""

EXITS: dict[Any, str] = {
    Tensor.numpy: "NumPy",
    Tensor.__array__: "NumPy",
    Tensor.__dlpack__: "DLPack",
    Tensor.tolist: "a list",
}
"""Methods that hand values to another library → which."""


def stands_in(tensor: Tensor) -> bool:
    """Whether it stands for another tensor while ``torch.vmap`` maps a function over that."""
    return torch.func.debug_unwrap(tensor) is not tensor


class Visible(TorchFunctionMode):
    """Calls ``dropout`` where a function is told not to drop, ``leave`` where values leave."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function of torch, and the operator that makes it visible."""
        settings = kwargs or {}
        kind = KINDS.get(func)  # these hand on their settings by keyword
        idle = kind is not None and settings["p"] and not settings["training"]
        if idle and not stands_in(args[0]):
            return torch.ops.prune2deploy.dropout(args[0], settings["p"], kind)
        if _attends(func, args, settings):
            return torch.ops.prune2deploy.attention(*args, **settings)
        if func in EXITS:
            torch.ops.prune2deploy.leave(args[0], EXITS[func])
        return func(*args, **settings)


class Watch(TorchDispatchMode):
    """Runs operators and shows each to ``ran``; one that is made of others shows these instead."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, or its parts."""
        kwargs = kwargs or {}
        if _is_made_of_others(func):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = func(*args, **kwargs)
        self.ran(func, args, kwargs, result)
        return result

    def ran(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Hear of an operator that has run."""
        raise NotImplementedError


_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


@cache
def _is_made_of_others(func: Any) -> bool:
    if not isinstance(func, torch._ops.OpOverload):
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE)
