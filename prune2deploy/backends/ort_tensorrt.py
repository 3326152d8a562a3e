"""What ONNX Runtime's TensorRT provider needs: the TensorRT that it is linked to, and a cache.

In: the onnxruntime package, an ONNX file. Out: whether that TensorRT is here, and the provider's
settings.
"""

from __future__ import annotations

import ctypes.util
import importlib.util
import re
from pathlib import Path
from typing import Any

from prune2deploy.backends.base import Availability
from prune2deploy.backends.tensorrt import import_module, version
from prune2deploy.errors import BuildError
from prune2deploy.exporting import companions

PACKAGE = "tensorrt>=10,<11"
"""What onnxruntime-gpu 1.31 is linked to (``libnvinfer.so.10``)."""
_LIBRARY = "libonnxruntime_providers_tensorrt.so"


def availability(onnxruntime: Any) -> Availability:
    """Look for TensorRT, as a Python package or in the system, in the version that is needed."""
    wanted = linked(Path(onnxruntime.__file__).parent / "capi" / _LIBRARY)
    if wanted is None:  # no wheel for Linux: opening a model will tell
        return Availability(True)
    here = version("tensorrt")
    system = ctypes.util.find_library("nvinfer") or ""
    if int((here or "0").partition(".")[0]) == wanted or system.endswith(f".so.{wanted}"):
        return Availability(True)
    return Availability(
        False,
        f"onnxruntime {onnxruntime.__version__} needs TensorRT {wanted}, found {here or 'none'}",
        f'pip install "tensorrt>={wanted},<{wanted + 1}"',
    )


def linked(library: Path) -> int | None:
    """The major version of TensorRT that a provider's library asks for by name."""
    named = (
        re.search(rb"libnvinfer\.so\.(\d+)", library.read_bytes()) if library.is_file() else None
    )
    return int(named[1]) if named else None


def load() -> None:
    """Load the libraries of the Python package, which the system does not find by itself."""
    if importlib.util.find_spec("tensorrt") is not None:
        import_module("tensorrt")


def settings(path: Path, device: int) -> dict[str, Any]:
    """The provider's settings for one ONNX file on one GPU.

    The engine that it builds is kept beside the file, so that it is not built (with kernels chosen
    anew) at each opening. The provider tells engines apart by names alone, not by weights, so each
    content of the file has a folder of its own; it is made here, as the provider makes no parents.

    Raises:
        BuildError: The folder cannot be made.
    """
    folder = path.parent / "tensorrt" / companions.digest(path)[:16]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(
            f"{folder}: TensorRT's engine cannot be kept there: {error}; expected a folder that "
            "can be written, beside the ONNX file"
        ) from error
    return {
        "device_id": device,
        "trt_engine_cache_enable": True,
        "trt_engine_cache_path": str(folder),
    }
