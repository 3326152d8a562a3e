"""The table of backends: name to class. Nothing is imported before it is asked for."""

from __future__ import annotations

import importlib
from dataclasses import replace

from prune2deploy import shipped
from prune2deploy.backends.base import Backend
from prune2deploy.errors import ConfigError
from prune2deploy.target import Target

BACKENDS: dict[str, tuple[str, str]] = {
    "ort": ("prune2deploy.backends.ort", "OrtBackend"),
    "openvino": ("prune2deploy.backends.openvino", "OpenVinoBackend"),
    "tensorrt": ("prune2deploy.backends.tensorrt", "TensorRtBackend"),
    "torch": ("prune2deploy.backends.torch_backend", "TorchBackend"),
    "null": ("prune2deploy.backends.null", "NullBackend"),
}
"""Backend name to the module and class that implement it."""


def get(name: str) -> Backend:
    """Return the backend called ``name``.

    Raises:
        ConfigError: There is no such backend.
    """
    if name not in BACKENDS:
        raise ConfigError(f"no backend {name!r}; expected one of {', '.join(sorted(BACKENDS))}")
    module, cls = BACKENDS[name]
    backend: Backend = getattr(importlib.import_module(module), cls)()
    return backend


def in_precision(target: Target, precision: str | None) -> Target:
    """Return ``target`` in the precision that ``--precision`` asks for; ``None`` leaves its own.

    Raises:
        ConfigError: Its backend does not run that.
    """
    if precision is None:
        return target
    get(target.backend).check_precision(precision, "--precision")
    return replace(target, precision=precision)


def for_target(target: Target) -> Backend:
    """Return the backend of ``target`` after checking what the profile tells it.

    Raises:
        ConfigError: No such backend, an option that it does not have or of the wrong type, or a
            value that it does not take (file:key).
    """
    if target.backend not in BACKENDS:
        raise ConfigError(
            f"{target.path}:backend: found {target.backend!r}, "
            f"expected one of {', '.join(sorted(BACKENDS))}"
        )
    backend = get(target.backend)
    if backend.options is not None:
        shipped.check_keys(target.path, dict(target.options), backend.options, "options.")
        for name, default in backend.options.items():
            target.option(name, default)
    backend.check(target)
    return backend
