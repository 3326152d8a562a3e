"""A deep copy of a module, in which given objects are replaced.

In: a module and, by identity, what stands for some of its tensors. Out: what ``copy.deepcopy``
gives with that memo. Modules are mostly empty tables of hooks, which a general copy takes apart
one by one; here a plain module is copied attribute by attribute, and whatever is out of the
ordinary (a class that says how it is copied, an attribute that is not a number or a table) is
left to ``copy.deepcopy``. What is one of its kind, a lock or a module of Python, is shared.
"""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from prune2deploy.errors import PruneError

ATOMS = frozenset({type(None), bool, int, float, complex, str, bytes})
TABLES = frozenset({dict, OrderedDict})
FLAT = frozenset({tuple, set})
SHARED = (ModuleType, type(threading.Lock()), type(threading.RLock()))


class _Detaching(TorchFunctionMode):
    """Copies the results of operators, which torch refuses to, without how they were computed."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run a function of torch; this is where each tensor that is to be copied comes by."""
        if func is torch.Tensor.__deepcopy__ and not args[0].is_leaf:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return func(*args, **(kwargs or {}))


def copied(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy, wherever its tensors come from.

    Args:
        module: It is not changed.
        memo: By ``id``, what stands for objects that are not to be copied.

    Raises:
        PruneError: it holds something that cannot be copied.
    """
    parts: dict[str, nn.Module] = dict(module.named_modules())
    kinds = {kind for kind in map(type, parts.values()) if _is_plain(kind)}
    plain = {path: part for path, part in parts.items() if type(part) in kinds}
    states = {path: part.__reduce_ex__(4)[2] for path, part in plain.items()}
    tables = {path: state for path, state in states.items() if type(state) is dict}
    for part in (plain[path] for path in tables):
        memo[id(part)] = type(part).__new__(type(part))
    with _Detaching():
        for path in reversed(tables):  # parts first: some classes copy those inside
            state = _state(path, plain[path], tables[path], memo)
            memo[id(plain[path])].__setstate__(state)
        try:
            return copy.deepcopy(module, memo)
        except Exception as error:
            raise _refusal(type(module).__name__, error) from error


def _state(
    path: str, part: nn.Module, table: dict[str, Any], memo: dict[int, Any]
) -> dict[str, Any]:
    """Copies of a module's attributes."""
    made: dict[str, Any] = {}
    name = ""
    try:
        for name, value in table.items():
            made[name] = _value(value, memo)
    except Exception as error:
        place = f"{path}.{name}" if path else name
        raise _refusal(f"{place} of {type(part).__name__}", error) from error
    return made


def _refusal(what: str, error: Exception) -> PruneError:
    return PruneError(
        f"{what} cannot be copied, and a model is copied to be pruned ({type(error).__name__}: "
        f"{error}). Take it out of the model, or give its class a __deepcopy__"
    )


def _is_plain(kind: type[nn.Module]) -> bool:
    """Whether instances are copied by their state alone, as ``nn.Module`` are."""
    own = ("__deepcopy__", "__reduce_ex__", "__reduce__", "__new__")
    return not any(name in vars(c) for c in kind.__mro__ if c is not object for name in own)


def _table(table: dict[Any, Any], memo: dict[int, Any], made: dict[Any, Any]) -> dict[Any, Any]:
    """Fill a table with copies."""
    for key, value in table.items():
        made[key if type(key) in ATOMS else copy.deepcopy(key, memo)] = _value(value, memo)
    return made


def _value(value: Any, memo: dict[int, Any]) -> Any:
    kind = type(value)
    if kind in ATOMS:
        return value
    if id(value) in memo:
        return memo[id(value)]
    if kind in TABLES:
        made = memo[id(value)] = kind()  # entered before it is filled: a table may hold itself
        return _table(value, memo, made) if value else made
    if kind in FLAT and all(type(item) in ATOMS for item in value):
        return memo.setdefault(id(value), kind(value))
    return value if isinstance(value, SHARED) else copy.deepcopy(value, memo)
