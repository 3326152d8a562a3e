"""ONNX Runtime: the CPU by default; CUDA, TensorRT and OpenVINO through its providers.

The engine is an ONNX file: a checked copy, or the graph that the runtime optimised where the
profile says ``save_optimized`` (it opens faster but belongs to one class of CPUs). Settings that
sway latency are fixed: threads, spinning, graph optimisation, denormals. Operators that a provider
leaves to another one are an error and are named, unless the profile allows it.
"""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from prune2deploy.atomic import replacing
from prune2deploy.backends import devices, onnx_file, ort_profile, ort_tensorrt
from prune2deploy.backends.base import (
    Array,
    Availability,
    Backend,
    Engine,
    Sample,
    Session,
    TensorSpec,
)
from prune2deploy.backends.feeds import random_feeds, require
from prune2deploy.errors import BackendError, BuildError, MissingBackend
from prune2deploy.target import Option, Target
from prune2deploy.timing import OperatorTiming

CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
ON_GPU = (CUDA, TENSORRT)
STRONGLY_TYPED = "1.22"
"""The first version whose TensorRT provider takes every precision from the file."""
PACKAGES = {
    CUDA: "onnxruntime-gpu[cuda,cudnn]",
    TENSORRT: f'onnxruntime-gpu[cuda,cudnn]>={STRONGLY_TYPED}" "{ort_tensorrt.PACKAGE}',
    OPENVINO: "onnxruntime-openvino",
}
"""The package whose onnxruntime carries a provider."""


class OrtBackend(Backend):
    """ONNX Runtime with the provider that the profile names."""

    name = "ort"
    options: ClassVar[Mapping[str, Option]] = {
        "provider": CPU,
        "device_type": "CPU",  # of the OpenVINO provider
        "spinning": True,  # idle threads wait busily, as the runtime does by default
        "save_optimized": False,
        "allow_fallback": False,  # let the CPU run what the provider leaves
    }

    def check(self, target: Target) -> None:
        """See the base class; the device is the one that the provider computes on."""
        super().check(target)
        provider = str(target.option("provider", CPU))
        if provider == CPU:
            devices.require(target, (devices.CPU,), provider)
        elif provider in ON_GPU:
            devices.require(target, (devices.GPU,), provider)
        elif provider == OPENVINO:
            kind = str(target.option("device_type", "CPU"))
            devices.require(target, (kind.lower(),), f"{provider} with device_type = {kind!r}")

    def availability(self, target: Target) -> Availability:
        """Look whether onnxruntime is installed and has the provider."""
        provider = str(target.option("provider", CPU))
        package = PACKAGES.get(provider, "onnxruntime")
        fix = f'pip install "{package}"'
        if package != "onnxruntime":
            fix = f"pip uninstall -y onnxruntime && {fix}"
        try:
            import onnxruntime
        except (ImportError, OSError) as error:
            return Availability(False, f"onnxruntime does not import: {error}", fix)
        found = onnxruntime.get_available_providers()
        if provider not in (*found, CPU, *PACKAGES):
            names = ", ".join(dict.fromkeys((CPU, *PACKAGES, *found)))
            return Availability(
                False,
                f"{target.path}:options.provider: found {provider!r}, expected one of {names}",
                "set provider in the profile's [options] to one of these names",
            )
        if provider not in found:
            return Availability(
                False,
                f"this onnxruntime has no {provider} (it has {', '.join(found)})",
                fix,
            )
        if provider == TENSORRT and _version(onnxruntime.__version__) < _version(STRONGLY_TYPED):
            reason = f"onnxruntime {onnxruntime.__version__} chooses precisions for TensorRT itself"
            return Availability(False, reason, fix)
        return _device(onnxruntime, provider, target)

    def int8_recipe(self, target: Target) -> str:
        """Unsigned activations on the CPU, whose kernels are made for them."""
        return "cpu" if target.option("provider", CPU) == CPU else "tensorrt"

    def arithmetic(self, target: Target) -> str:
        """TF32 in place of fp32 where TensorRT computes; the CUDA provider is told not to."""
        by_tensorrt = target.option("provider", CPU) == TENSORRT
        return "tf32" if target.precision == "fp32" and by_tensorrt else target.precision

    def build(self, onnx: Path, target: Target, out: Path) -> Engine:
        """Check and copy the model, open it once, and assert where its operators run."""
        started = time.perf_counter()
        onnx_file.check(onnx)
        path = onnx_file.place(onnx, out)
        if target.option("save_optimized", False):
            path = out / f"{onnx.stem}.optimized.onnx"
            with replacing(path) as temporary:
                self._open(onnx, target, optimized=temporary)
        else:
            self._open(path, target)
        if target.option("provider", CPU) != CPU and not target.option("allow_fallback", False):
            self._assert_provider(path, onnx, target)
        return Engine(path, onnx, self.name, time.perf_counter() - started)

    def open(self, engine: Engine, target: Target) -> Session:
        """Open an engine that ``build`` made."""
        return OrtSession(self._open(engine.path, target), target)

    def profile(
        self, engine: Engine, target: Target, feeds: Mapping[str, Array], runs: int
    ) -> tuple[OperatorTiming, ...]:
        """Read the runtime's own profile of ``runs`` runs; empty for all providers but the CPU's.

        TensorRT's and OpenVINO's run whole subgraphs as one operator each, and of CUDA's
        operators the profile has the launches only.
        """
        if target.option("provider", CPU) != CPU:
            return ()
        with ort_profile.folder() as prefix:
            session = self._open(engine.path, target, profile=prefix)
            with _running():
                for _ in range(runs + 3):  # the first runs are slower; minima ignore them
                    session.run(None, dict(feeds))
            events = ort_profile.read(Path(session.end_profiling()))
        return ort_profile.timings(events, onnx_file.logical_shapes(engine.onnx))

    def versions(self) -> dict[str, str]:
        """Version of onnxruntime and its build."""
        import onnxruntime

        return {"onnxruntime": onnxruntime.__version__}

    def _assert_provider(self, path: Path, onnx: Path, target: Target) -> None:
        provider = str(target.option("provider", CPU))
        with ort_profile.folder() as prefix:
            session = self._open(path, target, profile=prefix)
            with _running():
                session.run(None, random_feeds(_specs(session.get_inputs()), 0, onnx))
            events = ort_profile.read(Path(session.end_profiling()))
        strays = ort_profile.elsewhere(events, provider)
        if strays:
            raise BuildError(
                f"{path}: {len(strays)} operators do not run on {provider} but on the CPU: "
                f"{', '.join(strays[:8])}{' ...' if len(strays) > 8 else ''}; change the model, "
                "or set allow_fallback = true in the profile's [options] to accept it"
            )

    def _open(
        self,
        path: Path,
        target: Target,
        *,
        optimized: Path | None = None,
        profile: str | None = None,
    ) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise MissingBackend(
                f"onnxruntime does not import ({error}); pip install onnxruntime"
            ) from error
        provider = str(target.option("provider", CPU))
        options = _session_options(onnxruntime, target)
        if optimized is not None:
            options.optimized_model_filepath = str(optimized)
        if profile is not None:
            options.enable_profiling = True
            options.profile_file_prefix = profile
        if provider not in onnxruntime.get_available_providers():
            known = self.availability(target)
            raise MissingBackend(f"{target.name}: {known.reason}; {known.fix}")
        _load_libraries(onnxruntime, provider)
        try:
            session = onnxruntime.InferenceSession(
                str(path), options, providers=_providers(target, provider, path)
            )
        except Exception as error:  # its exceptions share no base but Exception
            raise BuildError(
                f"{path}: ONNX Runtime cannot open it: {error}{_advice(error)}"
            ) from error
        if session.get_providers()[0] != provider:
            raise BackendError(
                f"{path}: asked for {provider}, ONNX Runtime fell back to "
                f"{session.get_providers()[0]}; the provider's driver or libraries are missing"
            )
        return session


def _advice(error: Exception) -> str:
    """What to do where an operator has no kernel for the type of its tensors."""
    if "NOT_IMPLEMENTED" not in str(error):
        return ""
    return (
        "; it has that operator for other types of numbers, or not at all: where the model "
        "computes in float64, give it and its example inputs in float32 (model.float())"
    )


@functools.cache
def _load_libraries(onnxruntime: Any, provider: str) -> None:
    """Load, once, what a provider needs of the libraries that pip installed."""
    if provider in ON_GPU and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # CUDA and cuDNN, where torch has not
    if provider == TENSORRT:
        ort_tensorrt.load()


def _session_options(onnxruntime: Any, target: Target) -> Any:
    """Everything that sways latency, fixed.

    ``session.set_denormal_as_zero`` acts only through the first session of a process, so every
    session asks for it.
    """
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = target.threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    spin = "1" if target.option("spinning", True) else "0"
    options.add_session_config_entry("session.intra_op.allow_spinning", spin)
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    options.add_session_config_entry("session.set_denormal_as_zero", "1")
    return options


def _providers(target: Target, provider: str, path: Path) -> list[Any]:
    """The provider with its options, and the CPU for what it leaves."""
    if provider == TENSORRT:
        return [(TENSORRT, ort_tensorrt.settings(path, devices.device_index(target))), CPU]
    if provider == CUDA:
        return [(CUDA, {"device_id": devices.device_index(target), "use_tf32": 0}), CPU]
    if provider == OPENVINO:
        settings = {"device_type": str(target.option("device_type", "CPU"))}
        if target.threads:
            settings["num_of_threads"] = str(target.threads)
        return [(provider, settings), CPU]
    return [provider] if provider == CPU else [provider, CPU]


def _device(onnxruntime: Any, provider: str, target: Target) -> Availability:
    if provider not in ON_GPU:
        return Availability(True)
    if not devices.nvidia_gpu_visible():
        return Availability(False, devices.NO_GPU, devices.NO_GPU_FIX)
    devices.device_index(target)
    return ort_tensorrt.availability(onnxruntime) if provider == TENSORRT else Availability(True)


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(".")[:2])


def _specs(values: list[Any]) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(v.name, tuple(d if isinstance(d, int) else -1 for d in v.shape), _DTYPES[v.type])
        for v in values
    )


_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int16)": "int16",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(uint16)": "uint16",
    "tensor(uint32)": "uint32",
    "tensor(uint64)": "uint64",
    "tensor(bool)": "bool",
}


@contextlib.contextmanager
def _running() -> Iterator[None]:
    """What ONNX Runtime raises (a wrong shape, out of memory) as BackendError."""
    try:
        yield
    except Exception as error:  # its exceptions share no base but Exception
        raise BackendError(f"ONNX Runtime failed to run: {error}") from error


class OrtSession(Session):
    """An opened model; ``time_once`` runs on bound inputs and outputs."""

    def __init__(self, session: Any, target: Target) -> None:
        self._session = session
        self._on_gpu = str(target.option("provider", CPU)) in ON_GPU
        self._device_id = devices.device_index(target) if self._on_gpu else 0
        self._binding: Any = None
        self._values: dict[str, Any] = {}  # bound; older versions' bindings do not keep them
        self.inputs = _specs(session.get_inputs())
        self.outputs = _specs(session.get_outputs())

    def run(self, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Run once; outputs by name."""
        require(self.inputs, feeds)
        with _running():
            results = self._session.run(None, dict(feeds))
        return {
            spec.name: np.asarray(value) for spec, value in zip(self.outputs, results, strict=True)
        }

    def prepare(self, feeds: Mapping[str, Array]) -> None:
        """Bind inputs and outputs where the provider computes; transfers are not timed."""
        import onnxruntime

        require(self.inputs, feeds)
        device = "cuda" if self._on_gpu else "cpu"
        self._binding = self._session.io_binding()
        make = onnxruntime.OrtValue.ortvalue_from_numpy  # on the CPU it reads the array's memory
        with _running():
            self._values = {n: make(given, device, self._device_id) for n, given in feeds.items()}
            for name, value in self._values.items():
                self._binding.bind_ortvalue_input(name, value)
            for spec in self.outputs:
                self._binding.bind_output(spec.name, device, self._device_id)

    def time_once(self) -> Sample:
        """Run on the bound tensors; on a GPU until the device has finished."""
        session, binding = self._session, self._binding
        with _running():
            cpu = time.thread_time_ns()
            wall = time.perf_counter_ns()
            session.run_with_iobinding(binding)
            wall = time.perf_counter_ns() - wall
            cpu = time.thread_time_ns() - cpu
        return Sample(wall, cpu)

    def close(self) -> None:
        """Drop the session and what it bound."""
        self._binding = None
        self._values = {}
        self._session = None
