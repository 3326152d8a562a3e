"""Which library serves for GPU memory: the one that the profile names, or the first that opens.

In: a library's name, or ``auto``. Out: what ``gpu_buffers`` makes of it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from prune2deploy.backends.base import Availability
from prune2deploy.backends.gpu_buffers import (
    CudaPythonMemory,
    GpuMemory,
    PyCudaMemory,
    TorchMemory,
)
from prune2deploy.errors import MissingBackend

PROVIDERS: dict[str, tuple[str, Callable[[int], GpuMemory]]] = {
    "pycuda": ("pycuda", PyCudaMemory),
    "cuda": ("cuda.bindings", CudaPythonMemory),
    "torch": ("torch", TorchMemory),
}
"""Name in a profile to the Python package and the class; ``auto`` tries them in this order."""


def installed() -> tuple[str, ...]:
    """Names of the libraries that are installed, without importing them."""
    return tuple(name for name, (package, _) in PROVIDERS.items() if _is_installed(package))


def availability(wanted: str) -> Availability:
    """Say whether the library that the profile wants (or any, for ``auto``) is installed."""
    names = tuple(PROVIDERS) if wanted == "auto" else (wanted,)
    if any(name in installed() for name in names):
        return Availability(True)
    packages = ", ".join(PROVIDERS[name][0] for name in names)
    return Availability(
        False,
        f"no library for GPU memory is installed (looked for {packages})",
        'pip install "prune2deploy[trt]", or pip install cuda-python',
    )


def choose(wanted: str, index: int) -> GpuMemory:
    """Open GPU number ``index`` with the wanted library, or the first that opens for ``auto``.

    Raises:
        MissingBackend: None opens; says what each one answered.
    """
    failures = []
    for name in installed() if wanted == "auto" else (wanted,):
        opened = _open(name, index)
        if not isinstance(opened, str):
            return opened
        failures.append(f"{name}: {opened}")
    raise MissingBackend(
        f"no library can open GPU {index} ({'; '.join(failures) or 'none is installed'}); "
        'pip install "prune2deploy[trt]", or pip install cuda-python'
    )


def _open(name: str, index: int) -> GpuMemory | str:
    """Open a GPU with one library, or return why it could not."""
    try:
        return PROVIDERS[name][1](index)
    except Exception as error:  # noqa: BLE001  importing a driver binding may raise anything
        return f"{type(error).__name__}: {error}"


def _is_installed(package: str) -> bool:
    """Look for a package; the parent of a dotted name may be missing too."""
    parent = package.partition(".")[0]
    if importlib.util.find_spec(parent) is None:
        return False
    return parent == package or importlib.util.find_spec(package) is not None
