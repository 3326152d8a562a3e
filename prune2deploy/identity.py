"""Describes by content what a run works on: a run is resumed only where all of it agrees.

In: a module, its example inputs, calibration data. Out: plain values. Names are not enough: a file
of weights, a model's source or a folder of pictures may change between two equal commands.
"""

from __future__ import annotations

import hashlib
import inspect
import io
from collections.abc import Iterable
from operator import itemgetter
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy


def content(module: nn.Module, example_inputs: Iterable[Tensor], batches: Any) -> dict[str, str]:
    """Describe what a run works on.

    Args:
        module: The model; its state, its settings and the code of its classes count.
        example_inputs: Their types and shapes count.
        batches: Calibration data or ``None``. Data of our recipes counts by its content (of a
            callable's the first samples); of other data, which may be shuffled or augmented, only
            type and number of batches.

    Returns:
        ``weights``, ``code``, ``inputs`` and ``data`` as text.
    """
    return {
        "weights": weights_digest(module),
        "code": code_digest(module),
        "inputs": ", ".join(map(_described, example_inputs)),
        "data": "" if batches is None else _data(batches),
    }


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of a model's state, in order."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        if is_lazy(value):  # without a shape; tracing says so
            continue
        shape = (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else ()
        digest.update(f"{name}{shape}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(value: Any) -> Any:
    """The bytes of a tensor, or of anything else in a module's state."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_quantized
    if plain and value.is_meta:
        return b""
    if plain and not value.is_nested:
        dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
        return dense.flatten().view(torch.uint8).numpy()
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def code_digest(model: nn.Module) -> str:
    """SHA-256 over what a model computes beside its weights.

    That is the compiled methods of its own classes, the functions and constants of their files
    that these name, and the plain values among the attributes of every part, such as strides.
    Comments and places do not count.
    """
    found = {f"{name} {_settings(part)}" for name, part in model.named_modules()}
    kinds = {kind for module in model.modules() for kind in type(module).__mro__}
    for kind in kinds - {*nn.Module.__mro__}:
        functions = [(name, _function(value)) for name, value in vars(kind).items()]
        text = "".join(
            f"{n}{_code(f, set())}" for n, f in sorted(functions, key=itemgetter(0)) if f
        )
        found.add(f"{kind.__qualname__}{text}")
    return hashlib.sha256("".join(sorted(found)).encode()).hexdigest()


def _settings(part: nn.Module) -> str:
    kept = {k: v for k, v in vars(part).items() if _is_plain(v) and k != "training"}
    return f"{type(part).__qualname__}{sorted(kept.items())}"


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, complex, str, bytes))


def _function(value: Any) -> FunctionType | None:
    """The function behind a method, a property, a static method or a decorator."""
    inner = getattr(value, "__func__", None) or getattr(value, "fget", None) or value
    inner = inspect.unwrap(inner) if callable(inner) else inner
    return inner if isinstance(inner, FunctionType) else None


def _code(function: FunctionType, seen: set[FunctionType]) -> str:
    """A function, its defaults, and the functions and constants of its file that it names."""
    seen.add(function)
    given = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    text = [_compiled(function.__code__)]
    text += [repr(value) if _is_plain(value) else type(value).__name__ for value in given]
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        if _is_plain(value):
            text.append(f"{name}={value!r}")
        elif isinstance(value, FunctionType) and value.__module__ == function.__module__:
            text.append(_code(value, seen) if value not in seen else name)
    return "".join(text)


def _names(code: CodeType) -> tuple[str, ...]:
    inner = (c for c in code.co_consts if isinstance(c, CodeType))
    return (*code.co_names, *(name for c in inner for name in _names(c)))


def _compiled(value: Any) -> str:
    """A code object without line numbers and file names; other constants as Python writes them."""
    if isinstance(value, CodeType):
        constants = "".join(map(_compiled, value.co_consts))
        return f"{value.co_code.hex()}{value.co_names}{constants}"
    return str(sorted(map(repr, value))) if isinstance(value, frozenset) else repr(value)


def _described(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


def _data(batches: Any) -> str:
    known = getattr(batches, "sha256", "")
    count = len(batches) if hasattr(batches, "__len__") else "?"
    return str(known) or f"{type(batches).__name__} of {count} batches"
