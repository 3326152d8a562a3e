"""How a model is called: its inputs, a quiet mode that leaves it as it was, nested results."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import fields, is_dataclass
from operator import is_
from types import FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.graph.visible import Visible
from prune2deploy.modes import set_training

Inputs = tuple[Any, ...] | dict[str, Any]
Forward = Callable[[nn.Module, Any], Any]

PLAIN = frozenset({type(None), bool, int, float, str, torch.dtype, torch.device})
"""Types of which most arguments are, and in which nothing is nested."""


def tensors_in(tree: Any) -> Iterator[torch.Tensor]:
    """Every tensor of nested lists, tuples, mappings and dataclasses, in order."""
    if isinstance(tree, torch.Tensor):
        yield tree
    elif type(tree) not in PLAIN:
        for _, item in nested(tree):
            yield from tensors_in(item)


def nested(tree: Any) -> Iterable[tuple[Any, Any]]:
    """What a list, tuple, mapping or dataclass holds, by place, key or name; nothing in others."""
    if isinstance(tree, list | tuple):
        return enumerate(tree)
    if isinstance(tree, Mapping):
        return tree.items()
    if is_record(tree):
        names = (entry.name for entry in fields(tree))
        return ((name, getattr(tree, name)) for name in names if hasattr(tree, name))
    return ()


def is_record(tree: Any) -> bool:
    """Whether it is an instance of a dataclass."""
    return is_dataclass(tree) and not isinstance(tree, type)


def carried(inputs: Any) -> Iterator[tuple[torch.Tensor, str]]:
    """Tensors that lie deeper in nested arguments than ``tensors_in`` looks.

    These are attributes of objects of a class of their own, whose name comes with them.
    """
    left, seen = [(inputs, "")], set[int]()
    while left:
        tree, holder = left.pop()
        if id(tree) in seen or type(tree) in PLAIN:
            continue
        seen.add(id(tree))
        if isinstance(tree, torch.Tensor):
            if holder:
                yield tree, holder
        elif not isinstance(tree, OPAQUE):
            inside = [item for _, item in nested(tree)]
            left += [(item, holder) for item in inside]
            left += [(item, type(tree).__name__) for item in getattr(tree, "__dict__", {}).values()]


OPAQUE = (type, nn.Module, ModuleType, FunctionType, MethodType)
"""What is no data, even where it comes as an argument."""


def stored_tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters and buffers under all their names, shared ones repeatedly."""
    owners = list(model.named_modules(remove_duplicate=False))
    for tables in ("_parameters", "_buffers"):
        for path, owner in owners:
            prefix = f"{path}." if path else ""
            for leaf, tensor in getattr(owner, tables).items():
                if tensor is not None:
                    yield prefix + leaf, tensor


def state_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors of a model's state dict, without what else ``get_extra_state`` puts into it."""
    held = model.state_dict()
    return {name: value for name, value in held.items() if isinstance(value, torch.Tensor)}


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes: the device of what it stores; the CPU where it stores nothing."""
    return next((tensor.device for _, tensor in stored_tensors(model)), torch.device("cpu"))


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients or fused attention fast path; all restored on leaving.

    Dropout that is called as a function, and values that leave torch, show as operators.

    Attributes that the forward pass sets (caches of anchors, masks, positions), and lists, sets
    and tables that it fills, are set back too: the model is left as it was, and each later pass
    sees what the first one saw.
    """
    modules = list(model.modules())
    saved = _Attributes(modules)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        set_training(model, False)
        answers = _Answered() if _meta(modules) else nullcontext()
        # in inference mode torch shows operators before it takes them apart
        with torch.inference_mode(False), torch.no_grad(), Visible(), answers:
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        saved.restore()


@contextmanager
def untouched(model: nn.Module, *, shapes: bool = False) -> Iterator[None]:
    """As ``quiet``; what the forward pass writes into buffers and parameters is taken back too.

    Args:
        model: What runs inside.
        shapes: Whether it runs on shapes, which writes nothing into parameters.
    """
    dense = (b for b in model.buffers() if b.layout == torch.strided)
    saved = [(b, b.clone()) for b in dense if not b.is_inference()]
    try:
        with quiet(model), nullcontext() if shapes else _Unwritten(model):
            yield
    finally:
        with torch.no_grad():
            for buffer, copied in saved:  # some kernels write without counting versions up
                if buffer.is_meta or not torch.equal(buffer, copied):
                    buffer.copy_(copied)


class _Unwritten(TorchDispatchMode):
    """Takes back what operators write into parameters, such as rows brought to a largest norm.

    What is written to is copied before; few models do, and all parameters are large.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self._ours = {
            one.untyped_storage()._cdata for one in model.parameters() if _has_values(one)
        }
        self._copies: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable:
            for tensor in filter(_has_values, tensors_in((args, kwargs))):
                storage = tensor.untyped_storage()
                if storage._cdata in self._ours and storage._cdata not in self._copies:
                    self._copies[storage._cdata] = (storage, storage.clone())
        return func(*args, **(kwargs or {}))

    def __exit__(self, *raised: Any) -> None:
        super().__exit__(*raised)  # type: ignore[no-untyped-call]
        for storage, copied in self._copies.values():
            storage.copy_(copied)


def _has_values(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided and not tensor.is_meta


class _Answered(TorchDispatchMode):
    """Answers yes (or one) where code asks a tensor on ``meta``, which has no values, for one."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


def _meta(modules: list[nn.Module]) -> bool:
    tables = (table for m in modules for table in (m._parameters, m._buffers) if table)
    return any(t.is_meta for table in tables for t in table.values() if t is not None)


class _Attributes:
    """The attributes of modules, with what the containers among them hold, however deep."""

    def __init__(self, modules: list[nn.Module]) -> None:
        self._attributes = [(vars(module), dict(vars(module))) for module in modules]
        tables = [held for held, _ in self._attributes]
        self._contents = [(one, _content(one)) for one in _containers(tables)]

    def restore(self) -> None:
        """Set everything back; containers stay the same objects, since others refer to them."""
        for table, held in self._attributes:
            table.clear()
            table.update(held)
        for container, content in self._contents:
            if not _holds(container, content):  # one that refuses writes holds what it held
                container.clear()
                _fill(container, content)


NESTING = (dict, list, set, deque, tuple)
Container = dict[Any, Any] | list[Any] | set[Any] | deque[Any]


def _containers(tables: list[dict[str, Any]]) -> Iterator[Container]:
    """The containers that are values of the tables and within these, each once."""
    left: list[Any] = [*tables]
    seen = set(map(id, tables))
    while left:
        value = left.pop()
        for item in value.values() if isinstance(value, dict) else value:
            if isinstance(item, NESTING) and id(item) not in seen:
                seen.add(id(item))
                if not isinstance(item, tuple):
                    yield item
                if item:  # most are empty tables of hooks
                    left.append(item)


def _content(container: Container) -> dict[Any, Any] | list[Any]:
    """What is in a container, in order."""
    return dict(container) if isinstance(container, dict) else list(container)


def _fill(container: Container, content: Any) -> None:
    """Put the content back into a container that is empty."""
    if isinstance(container, list | deque):
        container.extend(content)
    else:
        container.update(content)


def _holds(container: Container, content: Any) -> bool:
    """Whether a container has the very content, in order."""
    if not container and not content:  # most tables of hooks
        return True
    same = same_items(container, content)
    if isinstance(container, dict):
        return same and all(map(is_, container.values(), content.values()))
    return same


def same_items(these: Collection[Any], those: Collection[Any]) -> bool:
    """Whether two collections hold the very same objects, in order."""
    return len(these) == len(those) and all(map(is_, these, those))


def run(model: nn.Module, example: Any, forward_fn: Forward | None = None) -> Any:
    """Call with ``forward_fn``, with keywords when the inputs are a dict, else positionally."""
    if forward_fn is not None:
        return forward_fn(model, example)
    inputs = as_inputs(example)
    return model(**inputs) if isinstance(inputs, dict) else model(*inputs)


def as_inputs(example: Any) -> Inputs:
    """One tensor, a tuple or list of arguments, or a dict of keywords, as call arguments."""
    if isinstance(example, Mapping):
        return dict(example)
    if isinstance(example, list | tuple):
        return tuple(example)
    return (example,)


def twice(example: Any) -> Any:
    """The example inputs with a batch of two where it was one; unchanged where it was not."""
    tensors = list(tensors_in(example))
    if any(t.dim() == 0 or t.shape[0] != 1 for t in tensors):
        return example
    return map_tensors(example, lambda t: torch.cat([t, t]))


def map_tensors(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Nested arguments with every tensor changed."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if type(tree) in PLAIN:
        return tree
    return _refilled(tree, {key: map_tensors(item, change) for key, item in nested(tree)})


def _refilled(tree: Any, items: dict[Any, Any]) -> Any:
    """A list, tuple, mapping or dataclass like the one given, that holds other items."""
    if isinstance(tree, list):
        return list(items.values())
    if isinstance(tree, tuple):
        make = getattr(tree, "_make", tuple)
        return make(items.values())
    if isinstance(tree, Mapping):
        return items
    if is_record(tree):
        tree = copy(tree)
        for name, item in items.items():
            object.__setattr__(tree, name, item)  # frozen ones refuse to be changed
    return tree
