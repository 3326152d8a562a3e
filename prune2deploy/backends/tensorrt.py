"""TensorRT: one adapter for ``tensorrt`` 10 and 11 and for ``tensorrt_rtx`` 1.x.

The profile's ``module`` option selects the library. Both get the same ONNX file, in which the
precision is written (see ``precision``), and the same build program; only ``tensorrt_rtx`` builds
for a GPU that is not there. Engines are cached by everything that decides their contents.
"""

from __future__ import annotations

import errno
import importlib
import importlib.util
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from prune2deploy import places
from prune2deploy.backends import devices, engine_store, gpu_driver, gpu_memory, onnx_file
from prune2deploy.backends.base import Array, Availability, Backend, Engine, Session
from prune2deploy.backends.engine_build import BuildRequest
from prune2deploy.backends.engine_store import Manifest
from prune2deploy.errors import BackendError, BuildError, ConfigError, MissingBackend
from prune2deploy.exporting import companions
from prune2deploy.target import Option, Target
from prune2deploy.timing import OperatorTiming

INSTALL = {"tensorrt": "trt", "tensorrt_rtx": "rtx"}
"""Module to the extra of this package that installs it."""


class TensorRtBackend(Backend):
    """TensorRT, or TensorRT for RTX."""

    name = "tensorrt"
    options: ClassVar[Mapping[str, Option]] = {
        "module": "tensorrt",
        "compute_capability": "",  # tensorrt_rtx: build for this GPU ("89") in place of ours
        "workspace_mb": 0,  # scratch memory limit; 0 is TensorRT's default
        "tf32": True,
        "batch_min": 1,  # of inputs whose batch is free in the ONNX file
        "batch_opt": 1,
        "batch_max": 8,
        "build_seconds": 1800.0,
        "cache": "",  # folder of the engine cache; empty is the user's cache folder
        "cache_mb": 8192,
        "memory": "auto",  # library for buffers and streams
        "cuda_graph": True,
        "transfers": False,  # count copies to and from the GPU as part of the latency
    }
    choices: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "module": tuple(INSTALL),
        "memory": ("auto", *gpu_memory.PROVIDERS),
    }
    least: ClassVar[Mapping[str, float]] = {"workspace_mb": 0, "cache_mb": 0, "build_seconds": 1}

    def check(self, target: Target) -> None:
        """See the base class; options must also fit each other, and the device be a GPU."""
        super().check(target)
        devices.device_index(target)
        places.expanded(_option_text(target, "cache"), f"{target.path}:options.cache")
        module, named = (_option_text(target, n) for n in ("module", "compute_capability"))
        sizes = _batch_sizes(target)
        checks = (
            (
                "compute_capability",
                not named or module == "tensorrt_rtx",
                "none: only tensorrt_rtx builds for a GPU that is not there",
            ),
            (
                "compute_capability",
                re.fullmatch(r"(\d{2,})?", named),
                "two or more digits without a point, such as '89' for 8.9",
            ),
            (
                "batch_max",
                1 <= sizes[0] <= sizes[1] <= sizes[2],
                f"1 <= batch_min <= batch_opt <= batch_max (they are {sizes})",
            ),
        )
        for key, fits, expected in checks:
            if not fits:
                found = target.option(key, self.options[key])
                raise ConfigError(
                    f"{target.path}:options.{key}: found {found!r}, expected {expected}"
                )

    def availability(self, target: Target) -> Availability:
        """Look for the module, the GPU and a library for its memory; imports none of them."""
        found = self.can_build(target)
        if not found.usable:
            return found
        facts = gpu_driver.facts(devices.device_index(target))
        if isinstance(facts, str):
            reason = f"engines can be built here but not run: {facts}"
            return Availability(False, reason, devices.NO_GPU_FIX)
        named = _option_text(target, "compute_capability")
        if named and named != facts.capability:
            return Availability(
                False,
                f"the profile builds for compute capability {named}, but the GPU here has "
                f"{facts.capability} ({facts.name})",
                "leave compute_capability out of the profile's [options] to build for this GPU",
            )
        return gpu_memory.availability(_option_text(target, "memory"))

    def can_build(self, target: Target) -> Availability:
        """Say whether engines can be built here: ``tensorrt_rtx`` needs no GPU for that."""
        module = _option_text(target, "module")
        fix = f'pip install "prune2deploy[{INSTALL[module]}]"'
        if module == "tensorrt" and devices.JETSON.exists():
            fix = "use the TensorRT of JetPack: python3 -m venv --system-site-packages .venv"
        if importlib.util.find_spec(module) is None:
            gpu = gpu_driver.facts(devices.device_index(target))
            also = f", and {gpu}" if isinstance(gpu, str) else ""
            return Availability(False, f"the Python package {module} is not installed{also}", fix)
        if module == "tensorrt_rtx" and _option_text(target, "compute_capability"):
            return Availability(True)
        facts = gpu_driver.facts(devices.device_index(target))
        if isinstance(facts, str):
            return Availability(False, facts, devices.NO_GPU_FIX)
        return Availability(True)

    def arithmetic(self, target: Target) -> str:
        """TF32 in place of fp32, unless the profile forbids it."""
        return "tf32" if target.precision == "fp32" and _uses_tf32(target) else target.precision

    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Build in a process of its own, or take the engine from the cache."""
        started = time.perf_counter()
        known = self.can_build(target)
        if not known.usable:
            raise MissingBackend(f"{target.name}: {known.reason}; {known.fix}")
        onnx_file.check(onnx)
        cache = _cache(target)
        request = _request(onnx, target, cache)
        seconds = float(target.option("build_seconds", 1800.0))
        engine = out / f"{onnx.stem}.engine"
        try:
            wanted = _wanted(onnx, target, request)
            cached = engine_store.obtain(cache, wanted, request, engine, seconds)
            engine_store.trim(cache, int(target.option("cache_mb", 8192)) << 20, cached)
        except OSError as error:
            raise BuildError(_unwritten(onnx, error, (cache, out))) from error
        log = engine_store.build_log(engine)
        return Engine(engine, onnx, self.name, time.perf_counter() - started, log)

    def open(self, engine: Engine, target: Target) -> Session:
        """Open an engine after checking that it fits this runtime and this GPU."""
        from prune2deploy.backends.tensorrt_session import TensorRtSession

        manifest = engine_store.read_manifest(engine.path)
        module = _option_text(target, "module")
        engine_store.check_fits(
            engine.path,
            manifest,
            module=module,
            version=version(module),
            device=_device_text(target),
        )
        known = self.availability(target)
        if not known.usable:
            raise MissingBackend(f"{target.name}: {known.reason}; {known.fix}")
        trt = import_module(module)
        memory = gpu_memory.choose(_option_text(target, "memory"), devices.device_index(target))
        try:
            return TensorRtSession(trt, engine.path, memory, target)
        except BaseException:
            memory.close()
            raise

    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Time every layer with TensorRT's own profiler; shapes come from its inspector."""
        from prune2deploy.backends.tensorrt_session import TensorRtSession

        with self.open(engine, target) as session:
            if not isinstance(session, TensorRtSession):
                raise BackendError("the engine did not open as a TensorRT session")
            return session.profile(feeds, runs)

    def versions(self) -> dict[str, str]:
        """Versions of whichever TensorRT libraries are installed, and of the GPU driver."""
        found = {name: version(name) for name in INSTALL}
        return {**{n: v for n, v in found.items() if v}, **gpu_driver.versions()}


def version(module: str) -> str:
    """Version of a TensorRT library; empty if it is not there or does not import."""
    if importlib.util.find_spec(module) is None:
        return ""
    try:
        return str(import_module(module).__version__)
    except MissingBackend:
        return ""


def import_module(module: str) -> Any:
    """Import a TensorRT library.

    Raises:
        MissingBackend: It cannot be imported; its import may raise anything.
    """
    try:
        return importlib.import_module(module)
    except Exception as error:
        raise MissingBackend(
            f"{module} is installed but does not import ({type(error).__name__}: {error}); "
            f'pip install --force-reinstall "prune2deploy[{INSTALL[module]}]"'
        ) from error


def _unwritten(onnx: Path, error: OSError, folders: tuple[Path, Path]) -> str:
    """Say that an engine cannot be written to the cache or the folder it is wanted in, and why."""
    cache, out = folders
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "free space in" if full else "expected to write in"
    return (
        f"{onnx}: the engine cannot be written: {error}; {what} {cache} and {out}, "
        "or set cache in the profile's [options] to another folder"
    )


def _uses_tf32(target: Target) -> bool:
    return bool(target.option("tf32", True))


def _option_text(target: Target, name: str) -> str:
    return str(target.option(name, TensorRtBackend.options[name]))


def _cache(target: Target) -> Path:
    given = _option_text(target, "cache")
    return places.expanded(given) if given else places.cache() / "engines"


def _device_text(target: Target) -> str:
    """What an engine of this profile is bound to."""
    named = _option_text(target, "compute_capability")
    if named:
        return f"compute capability {named}"
    facts = gpu_driver.facts(devices.device_index(target))
    if isinstance(facts, str):
        return "no GPU"
    if _option_text(target, "module") == "tensorrt_rtx":
        return f"compute capability {facts.capability}"
    return f"{facts.name}, compute capability {facts.capability}"


def _batch_sizes(target: Target) -> tuple[int, int, int]:
    """Least, best and largest size of a batch that is free."""
    least, best, most = (
        int(target.option(f"batch_{n}", d)) for n, d in (("min", 1), ("opt", 1), ("max", 8))
    )
    return least, best, most


def _request(onnx: Path, target: Target, cache: Path) -> BuildRequest:
    module = _option_text(target, "module")
    capability = _option_text(target, "compute_capability")
    timing = ""
    if module == "tensorrt":  # tensorrt_rtx accepts one and ignores it
        name = engine_store.text_key(f"{version(module)} {_device_text(target)}")
        timing = str(cache / f"timing-{name}.bin")
    return BuildRequest(
        module=module,
        onnx=str(onnx),
        engine="",
        capability=capability,
        workspace_mb=int(target.option("workspace_mb", 0)),
        tf32=_uses_tf32(target),
        batch=_batch_sizes(target),
        capture=module == "tensorrt_rtx" and bool(target.option("cuda_graph", True)),
        timing_cache=timing,
        gpu=0 if capability else devices.device_index(target),
    )


def _wanted(onnx: Path, target: Target, request: BuildRequest) -> Manifest:
    return Manifest(
        module=request.module,
        version=version(request.module),
        device=_device_text(target),
        onnx_sha256=companions.digest(onnx),
        engine_sha256="",
        settings={
            "workspace_mb": request.workspace_mb,
            "tf32": request.tf32,
            "batch": list(request.batch),
            "capture": request.capture,
        },
        seconds=0.0,
    )
