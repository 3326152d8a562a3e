"""Modules that a rule of the user describes as a whole.

In: the call of a module whose class has a rule. Out: one recorded operation in place of the
operators inside, for modules that compute what torch does not see (an extension, NumPy) or whose
code says less about its channels than their author knows. The module stays a module in the pruned
model: its tensors are sliced, and attributes that repeat a width follow.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from prune2deploy.errors import TraceError
from prune2deploy.graph.calling import stored_tensors, tensors_in
from prune2deploy.graph.layout import Layout, freeze, leaves
from prune2deploy.graph.rules import MODULE_RULES, Call, Notebook, Rule


@dataclass(frozen=True)
class WholeModule:
    """Stands where an operation names its operator.

    Attributes:
        path: Of the module.
        name: For messages, and to tell operations apart.
        single: Whether it returns one tensor, and not a tuple of them.
    """

    path: str
    name: str
    single: bool


def rule_of(module: nn.Module) -> Rule | None:
    """The rule of the nearest class of a module that has one."""
    if not MODULE_RULES:
        return None
    return next((MODULE_RULES[c] for c in type(module).__mro__ if c in MODULE_RULES), None)


def name_of(module: nn.Module) -> str:
    """How a module's class is called in messages."""
    return f"module {type(module).__qualname__}"


class WholeCall(Call):
    """One module call as a rule sees it.

    ``call["x"]`` and ``call.dims("x")`` find arguments by the names that ``forward`` gives them,
    then parameters and buffers (``"scale"``, ``"up.weight"``), then attributes of the module. What
    a rule notes in ``symbols`` under an attribute's name is that attribute's width.

    Attributes:
        module: The module that was called.
    """

    def __init__(
        self, path: str, module: nn.Module, given: tuple[Any, Any], result: Any, notebook: Notebook
    ) -> None:
        self.module = module
        self.outputs = _outputs(module, result)
        self.func = WholeModule(path, name_of(module), isinstance(result, torch.Tensor))
        self.name = self.func.name
        self.notebook = notebook
        self.symbols = {}
        self._args, self._kwargs = given
        self._stored = dict(stored_tensors(module))
        self._bound = inspect.signature(module.forward).bind(*self._args, **self._kwargs).arguments
        self._tensors = [*tensors_in(given), *self._stored.values()]

    def __getitem__(self, name: str) -> Any:
        """An argument, a stored tensor or an attribute.

        Raises:
            TraceError: There is none of that name.
        """
        for table in (self._bound, self._stored):
            if name in table:
                return table[name]
        if not hasattr(self.module, name):
            known = ", ".join((*self._bound, *self._stored))
            raise TraceError(
                f"the rule of {self.name} asks for {name!r}, which is no argument, stored tensor "
                f"or attribute of it; there are {known}"
            )
        return getattr(self.module, name)

    def settle(self, outputs: Iterable[Layout]) -> None:
        """Freeze dimensions of stored tensors that the rule relates to no other dimension."""
        terms = [self.notebook.value(tensor).dims for tensor in self._tensors or ()]
        stored = [self.notebook.value(tensor).dims for tensor in self._stored.values()]
        seen: dict[int, int] = {}
        for node in (node for dims in (*terms, *outputs) for node in dims):
            for below in leaves(node):
                seen[id(below)] = seen.get(id(below), 0) + 1
        for node in (node for dims in stored for node in dims):
            alone = [below for below in leaves(node) if seen[id(below)] == 1]
            freeze(alone, f"the rule of {self.name} does not speak of it")


def _outputs(module: nn.Module, result: Any) -> list[torch.Tensor]:
    items = [result] if isinstance(result, torch.Tensor) else result
    if not isinstance(items, list | tuple) or not all(isinstance(t, torch.Tensor) for t in items):
        raise TraceError(
            f"{name_of(module)} has a rule and returns {type(result).__name__}; expected a tensor "
            "or a tuple of tensors"
        )
    return list(items)


Ended = Callable[[nn.Module, Any, Any], None]


@contextmanager
def watched(model: nn.Module, inside: list[nn.Module], ended: Ended) -> Iterator[None]:
    """While this is open, ``inside`` holds the modules with rules that run, outermost first.

    Args:
        model: Whose modules are watched.
        inside: Filled and emptied.
        ended: Is given each outermost one with its arguments and its result, unless it failed.
    """

    def before(module: nn.Module, _: Any) -> None:
        inside.append(module)

    def after(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
        if len(inside) == 1:
            ended(module, (args, kwargs), result)

    def leave(module: nn.Module, args: Any, result: Any) -> None:
        inside.pop()

    parts = [part for part in model.modules() if rule_of(part) is not None]
    handles = [part.register_forward_pre_hook(before) for part in parts]
    handles += [part.register_forward_hook(after, with_kwargs=True) for part in parts]
    handles += [part.register_forward_hook(leave, always_call=True) for part in parts]
    try:
        yield
    finally:
        inside.clear()
        for handle in handles:
            handle.remove()
