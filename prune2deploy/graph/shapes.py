"""Run a model for its shapes: what its operators are and how wide, without the arithmetic.

In: a model and example inputs. Floating-point inputs and the model's parameters are stood for by
outlines: tensors with a shape, strides, a type and a device but no values. What is computed from
an outline is an outline; everything else (whole numbers given as input, masks and tables that the
code makes, buffers) is computed as ever, so that code which looks at it decides as ever. Where
code looks at the values of an outline, ``NeedsValues`` is raised and the caller runs the model on
values instead. An outline that does not fit its operator is refused as a tensor would be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from prune2deploy.graph.calling import map_tensors
from prune2deploy.graph.shape_kernels import KERNELS, Form

META = torch.device("meta")


class NeedsValues(RuntimeError):  # noqa: N818  reads as the reason it is
    """The code asks for values, of which an outline has none."""


class Outline(torch.Tensor):
    """A tensor without values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch annotates its placeholder
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Refuse: only ``OnShapes`` knows what to do with an outline."""
        raise NeedsValues(f"{func} met an outline outside of the run that made it")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Outline({tuple(self.shape)}, {self.dtype})"


def outlined(example: Any) -> Any:
    """Nested inputs with every floating-point tensor replaced by its outline."""
    drawn: dict[int, torch.Tensor] = {}

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_floating_point():
            return tensor
        return drawn.setdefault(id(tensor), outline(tensor))

    return map_tensors(example, change)


@contextmanager
def on_shapes(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Run what is inside on shapes if that is wanted, else on values.

    Raises:
        NeedsValues: shapes do not say what the code does, whether or not the code noticed.
    """
    if not wanted:
        yield
        return
    mode = OnShapes(model)
    with mode:
        yield
    if mode.failed:
        raise NeedsValues("an operator could not be run on shapes, and the code went on")


def outline(tensor: torch.Tensor, device: torch.device | None = None) -> torch.Tensor:
    """The outline of a tensor, on its device unless another is given."""
    form = Form(tuple(tensor.shape), tensor.stride(), tensor.dtype)
    return _drawn(form, tensor.device if device is None else device)


def _drawn(form: Form, device: torch.device) -> torch.Tensor:
    shape, strides, dtype = form
    drawn: torch.Tensor = torch.Tensor._make_wrapper_subclass(
        Outline, shape, strides, dtype=dtype, device=device
    )
    return drawn


class OnShapes(TorchDispatchMode):
    """Computes outlines instead of tensors.

    Attributes:
        failed: Whether an operator could not be run on outlines, even if the code caught that.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        self.failed = False
        self._weights = {id(parameter) for parameter in model.parameters()}
        self._forms: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run one operator: on values where all are known, else on shapes."""
        kwargs = kwargs or {}
        given = list(_tensors(args, kwargs))
        if not any(self._unknown(tensor) for tensor in given):
            return func(*args, **kwargs)
        try:
            return self._on_shapes(func, args, kwargs, given)
        except Exception:
            self.failed = True
            raise

    def _unknown(self, tensor: torch.Tensor) -> bool:
        return type(tensor) is Outline or id(tensor) in self._weights

    def _on_shapes(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], given: list[torch.Tensor]
    ) -> Any:
        self._check(func, args, given)
        device = given[0].device
        kernel = KERNELS.get(func)
        forms = kernel(*args, **kwargs) if kernel is not None else None
        if forms is None:
            return self._on_meta(func, args, kwargs)
        if written_places(func):
            return args[0]
        if isinstance(forms, list):
            return tuple(_drawn(form, device) for form in forms)
        return _drawn(forms, device)

    def _check(self, func: Any, args: tuple[Any, ...], given: list[torch.Tensor]) -> None:
        """Raise NeedsValues where the result depends on more than shapes."""
        if _asks_values(func) or any(t.dtype == torch.bool for t in _indices(func, args)):
            raise NeedsValues(f"{func} depends on values")
        if len({tensor.device for tensor in given if tensor.dim()}) > 1:
            raise NeedsValues("tensors on several devices")
        for place in written_places(func):
            if place < len(args) and not all(map(self._unknown, _tensors(args[place : place + 1]))):
                raise NeedsValues(f"{func} writes unknown values into a known tensor")

    def _on_meta(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Ask PyTorch's own shape functions, those of the ``meta`` device."""
        devices = [tensor.device for tensor in _tensors(args, kwargs)]
        device = kwargs.get("device") or devices[0]
        if "device" in kwargs:
            kwargs = {**kwargs, "device": META}
        known: dict[int, torch.Tensor] = {}
        found = func(
            *(self._meta(arg, known) for arg in args),
            **{name: self._meta(arg, known) for name, arg in kwargs.items()},
        )
        if isinstance(found, list | tuple):
            return type(found)(self._back(item, known, device) for item in found)
        return self._back(found, known, device)

    def _meta(self, tree: Any, known: dict[int, torch.Tensor]) -> Any:
        if isinstance(tree, torch.Tensor):
            held, form = self._forms.get(id(tree), (None, None))
            if held is not tree or form is None or form.shape != tree.shape:
                form = torch.empty_strided(tree.shape, tree.stride(), dtype=tree.dtype, device=META)
                self._forms[id(tree)] = (tree, form)
            known[id(form)] = tree
            return form
        if isinstance(tree, list | tuple):
            return type(tree)(self._meta(item, known) for item in tree)
        return tree

    def _back(self, found: Any, known: dict[int, torch.Tensor], device: torch.device) -> Any:
        if not isinstance(found, torch.Tensor):
            return found
        given = known.get(id(found))
        if given is None:
            return outline(found, torch.device(device))
        if given.shape != found.shape:
            raise NeedsValues("a shape is changed in place")
        return given


def _tensors(args: Any, kwargs: Mapping[str, Any] = {}) -> Iterator[torch.Tensor]:
    for arg in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(arg, torch.Tensor):
            yield arg
        elif isinstance(arg, list | tuple):
            yield from (item for item in arg if isinstance(item, torch.Tensor))


@cache
def _asks_values(func: Any) -> bool:
    by_index = func._schema.name in INDEXED
    tags = func.tags
    dynamic = torch.Tag.dynamic_output_shape in tags and not by_index
    return dynamic or torch.Tag.data_dependent_output in tags


INDEXED = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_unsafe_index")


def _indices(func: Any, args: tuple[Any, ...]) -> list[torch.Tensor]:
    """What an indexing operator picks by; a mask among them decides how much that is."""
    return list(_tensors(args[1:2])) if func._schema.name in INDEXED else []


@cache
def written_places(func: Any) -> tuple[int, ...]:
    """Places of the arguments that an operator writes to."""
    schema = getattr(func, "_schema", None)
    return tuple(
        place
        for place, argument in enumerate(() if schema is None else schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    )
