"""The user's own models: ``package.module:factory`` and ``file.py:factory``.

In: where a callable lives. Out: what it returns: a module, or (module, example inputs). The code
is the user's and is run; modules are also looked for in the current folder, and beside a file.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from prune2deploy.errors import ModelError
from prune2deploy.models.loaded import LoadedModel, Request
from prune2deploy.places import importable


def load(request: Request) -> LoadedModel:
    """Call the user's factory.

    Example inputs that the factory returns are kept as they are, unless a batch above 1 (their
    first dimension is repeated to it) or an input size (their last two are drawn anew) is asked
    for. Without any, one picture of shape (batch, 3, 224, 224) is drawn.

    Raises:
        ModelError: The module or the factory is not there, fails, or returns something else.
    """
    place, _, attribute = request.name.rpartition(":")
    beside = [Path(place).resolve().parent] if place.endswith(".py") else []
    with importable(*beside, Path.cwd()):
        factory = _attribute(_module(place), place, attribute)
        made = _call(factory, request.name)
    module, inputs = _unpack(made, request.name)
    return LoadedModel(
        module=module,
        example_inputs=_inputs(inputs, request),
        spec=request.name,
        library="factory",
        input_names=(),
    )


def _module(place: str) -> ModuleType:
    try:
        if place.endswith(".py"):
            return _file(Path(place))
        return importlib.import_module(place)
    except ModelError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (place + ".").startswith(error.name + "."):
            raise ModelError(
                f"no module {place!r} found (nothing is called {error.name!r}); expected "
                "package.module:factory, importable from here, or file.py:factory"
            ) from error
        raise ModelError(f"module {place!r} cannot be imported: {error}") from error
    except (Exception, SystemExit) as error:
        raise ModelError(f"module {place!r} cannot be imported: {_reason(error)}") from error


def _file(path: Path) -> ModuleType:
    if not path.is_file():
        raise ModelError(f"no file {str(path)!r} found; expected file.py:factory")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None, path
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # dataclasses and pickles look their module up
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, place: str, name: str) -> Any:
    names = vars(module)
    if name in names:
        return names[name]
    public = [n for n, v in names.items() if callable(v) and not n.startswith("_")]
    near = difflib.get_close_matches(name, public, n=5, cutoff=0.4) or sorted(public)[:5]
    raise ModelError(
        f"module {place!r} has no {name!r}; callables that it has: {', '.join(near) or 'none'}"
    )


def _call(factory: Any, name: str) -> Any:
    if isinstance(factory, nn.Module):
        return factory
    if not callable(factory):
        raise ModelError(
            f"{name!r} is a {type(factory).__name__}; expected a callable without arguments that "
            "returns a torch.nn.Module or (module, example_inputs)"
        )
    try:
        return factory()
    except (Exception, SystemExit) as error:
        raise ModelError(f"{name!r} failed: {_reason(error)}") from error


def _reason(error: BaseException) -> str:
    told = f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        told += "; put what a script does on its own behind: if __name__ == '__main__'"
    return told


def _unpack(made: Any, name: str) -> tuple[nn.Module, tuple[Tensor, ...]]:
    module, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, ())
    inputs = (inputs,) if isinstance(inputs, Tensor) else inputs
    fits = isinstance(module, nn.Module) and isinstance(inputs, (tuple, list))
    if fits and all(isinstance(one, Tensor) for one in inputs):
        return module, tuple(inputs)
    raise ModelError(
        f"{name!r} returned {_told(made)}; expected a torch.nn.Module, or (module, example_inputs) "
        "with example_inputs a tensor or a tuple of tensors (a module of your own may put others "
        "together from tensors)"
    )


def _told(made: Any) -> str:
    """The types of nested tuples and lists."""
    if isinstance(made, (tuple, list)):
        return f"({', '.join(map(_told, made))})"
    return type(made).__name__


def _inputs(inputs: tuple[Tensor, ...], request: Request) -> tuple[Tensor, ...]:
    if not inputs:
        return (request.normal(3, *request.size((224, 224))),)
    if request.input_size is not None:
        inputs = tuple(_resized(one, request) for one in inputs)
    if request.batch == 1:
        return inputs
    first = {one.shape[0] if one.ndim else 0 for one in inputs}
    if len(first) != 1 or 0 in first:
        raise ModelError(
            f"{request.name!r} gives inputs of shapes {[tuple(i.shape) for i in inputs]}, which "
            f"have no common first dimension to set to batch {request.batch}; have the factory "
            "return inputs of the wanted batch"
        )
    rows = torch.arange(request.batch) % first.pop()
    return tuple(one[rows] for one in inputs)


def _resized(one: Tensor, request: Request) -> Tensor:
    if one.ndim < 4 or not one.is_floating_point() or request.input_size is None:
        raise ModelError(
            f"{request.name!r} gives an input of shape {tuple(one.shape)} ({one.dtype}), to which "
            "an input size cannot apply; leave --input-size out"
        )
    generator = torch.Generator().manual_seed(request.seed)
    return torch.randn(*one.shape[:-2], *request.input_size, generator=generator)
