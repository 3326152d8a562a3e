"""Builds one TensorRT engine: the program that the adapter runs in a process of its own.

    python -m prune2deploy.backends.engine_build REQUEST.json

In: a request file. Out: the engine and an answer file beside it; the log on standard output.
One code path serves ``tensorrt`` 10 and 11 and ``tensorrt_rtx`` 1.x: the network is strongly
typed, so the ONNX file alone decides every precision, and nothing is used that one of them lacks.

A builder may crash, hang or eat all memory; in a process of its own it takes nothing with it.
TensorRT only logs wrong settings and returns ``None`` for failures, so each step here looks at
what it got and raises what the logger heard.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from prune2deploy.backends import gpu_driver
from prune2deploy.errors import BackendError

ANSWER = "answer.json"


@dataclass(frozen=True)
class BuildRequest:
    """What to build.

    Attributes:
        module: ``tensorrt`` or ``tensorrt_rtx``.
        onnx: The ONNX file.
        engine: Where the engine goes; the answer goes beside it.
        capability: Compute capability to build for (``"89"``), or empty for this machine's GPU.
            Only ``tensorrt_rtx`` can build for another GPU than the one that is there.
        workspace_mb: Limit of scratch memory in MiB; 0 leaves it to TensorRT.
        tf32: Let fp32 contractions use TF32 tensor cores.
        batch: Least, best and largest batch of inputs whose batch is free.
        capture: Whether the engine must let itself be launched as a CUDA graph; ``tensorrt_rtx``.
        timing_cache: File with kernel timings to reuse and extend, or empty.
        gpu: Number of the GPU to build on.
    """

    module: str
    onnx: str
    engine: str
    capability: str = ""
    workspace_mb: int = 0
    tf32: bool = True
    batch: tuple[int, int, int] = (1, 1, 8)
    capture: bool = True
    timing_cache: str = ""
    gpu: int = 0

    def to_json(self) -> str:
        """Write the request as JSON text."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> BuildRequest:
        """Read what ``to_json`` wrote."""
        values = json.loads(text)
        return BuildRequest(**{**values, "batch": tuple(values["batch"])})


class BuildFailed(Exception):  # noqa: N818 - a step's outcome; the adapter turns it into BuildError
    """A step of the build failed; the text says which and why."""


def build(request: BuildRequest) -> dict[str, Any]:
    """Build the engine and write it; return facts for the answer file.

    Raises:
        BuildFailed: An operator is not supported, a shape is free that may not be, memory ran
            out, or TensorRT gave nothing back.
    """
    started = time.perf_counter()
    if request.gpu:  # 0 is what CUDA begins with
        gpu_driver.use(request.gpu)
    trt = importlib.import_module(request.module)
    heard = _Heard(trt)  # must outlive the builder, which reports to it until it is gone
    facts = _build(trt, heard, request)
    return {**facts, "version": trt.__version__, "seconds": time.perf_counter() - started}


def _build(trt: Any, heard: _Heard, request: BuildRequest) -> dict[str, Any]:
    builder = trt.Builder(heard.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, heard.logger)
    if not parser.parse_from_file(request.onnx):
        raise BuildFailed(_parse_errors(parser))
    config = builder.create_builder_config()
    _configure(trt, config, request)
    _optimization_profile(builder, network, config, request.batch)
    heard.check("setting up the build")
    cache = _load_timing_cache(config, request.timing_cache)
    heard.forget()  # a damaged cache is complained about, and only costs time
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildFailed(f"TensorRT built no engine: {heard.text()}{_capture_hint(request)}")
    data = bytes(plan)
    Path(request.engine).write_bytes(data)
    if cache is not None:
        Path(request.engine).with_name("timing.bin").write_bytes(bytes(cache.serialize()))
    return {"layers": network.num_layers, "bytes": len(data)}


def _configure(trt: Any, config: Any, request: BuildRequest) -> None:
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # layer names for the profile
    if request.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mb << 20)
    if request.tf32:
        config.set_flag(trt.BuilderFlag.TF32)
    else:
        config.clear_flag(trt.BuilderFlag.TF32)
    if request.module == "tensorrt_rtx":
        if request.capture:  # large tensors are allocated as it runs otherwise: no graph takes that
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        _target_gpu(trt, config, request)


def _capture_hint(request: BuildRequest) -> str:
    if request.module != "tensorrt_rtx" or not request.capture:
        return ""
    return (
        "; it was asked for an engine that runs as a CUDA graph: cuda_graph = false in the "
        "profile's [options] may help"
    )


def _target_gpu(trt: Any, config: Any, request: BuildRequest) -> None:
    """Build for one GPU, that which was asked for or ours; an unknown one is refused by name.

    Without a choice the library builds for several at once, of which ours need not be one.
    """
    wanted, named = request.capability, "compute capability"
    if not wanted:
        gpu = gpu_driver.facts(request.gpu)
        if isinstance(gpu, str):
            raise BuildFailed(gpu)
        wanted, named = gpu.capability, f"the GPU here, {gpu.name}, of compute capability"
    known = trt.ComputeCapability.__members__
    if f"SM{wanted}" not in known:
        choices = ", ".join(n.removeprefix("SM") for n in known if n.startswith("SM"))
        raise BuildFailed(
            f"{named} {wanted!r} is not known to {request.module} {trt.__version__}; "
            f"expected one of {choices}"
        )
    config.num_compute_capabilities = 1
    if not config.set_compute_capability(known[f"SM{wanted}"], 0):
        raise BuildFailed(f"{request.module} does not take compute capability {wanted}")


def _optimization_profile(
    builder: Any, network: Any, config: Any, batch: tuple[int, int, int]
) -> None:
    """Give every input with a free batch its least, best and largest shape."""
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    free = [given for given in inputs if -1 in tuple(given.shape)]
    if not free:
        return
    profile = builder.create_optimization_profile()
    for given in free:
        shape = tuple(given.shape)
        if -1 in shape[1:]:
            raise BuildFailed(
                f"input {given.name!r} has the shape {shape}: only the batch (dimension 0) may be "
                "free; export the model with its other dimensions fixed"
            )
        profile.set_shape(given.name, *((size, *shape[1:]) for size in batch))
    if config.add_optimization_profile(profile) < 0:
        raise BuildFailed(f"TensorRT refuses the batch sizes {batch}: least, best, largest")


def _load_timing_cache(config: Any, path: str) -> Any:
    """Attach kernel timings of earlier builds; one that does not fit counts as empty."""
    if not path:
        return None
    file = Path(path)
    stored = file.read_bytes() if file.exists() else b""
    for data in (stored, b""):
        cache = config.create_timing_cache(data)
        if cache is not None and config.set_timing_cache(cache, ignore_mismatch=False):
            return cache
    return None


def _parse_errors(parser: Any) -> str:
    """Name the operator and the node of every parser error."""
    lines = []
    for i in range(parser.num_errors):
        error = parser.get_error(i)
        lines.append(
            f"operator {error.node_operator()!r} at node {error.node_name()!r}: {error.desc()}"
        )
    return "TensorRT cannot take this model: " + ("; ".join(lines) or "no reason was given")


class _Heard:
    """A logger that prints everything and remembers the errors.

    Errors reach the logger as well as an error recorder. A recorder written in Python crashes
    ``tensorrt_rtx`` 1.7 when the builder that it is attached to is released, so none is used.
    """

    def __init__(self, trt: Any) -> None:
        said: list[str] = []
        serious = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

        class Logger(trt.ILogger):  # type: ignore[misc, name-defined, unused-ignore]
            def log(self, severity: Any, text: str) -> None:
                if severity != trt.ILogger.Severity.VERBOSE:
                    sys.stdout.write(f"[{severity.name}] {text}\n")
                if severity in serious:
                    said.append(text)

        self.logger, self._said = Logger(), said

    def text(self) -> str:
        """Return everything that went wrong, once each."""
        return "; ".join(dict.fromkeys(self._said)) or "it gave no reason"

    def forget(self) -> None:
        """Drop what was reported so far; it stays in the log."""
        self._said.clear()

    def check(self, step: str) -> None:
        """Raise BuildFailed if anything was reported."""
        if self._said:
            raise BuildFailed(f"TensorRT reports an error while {step}: {self.text()}")


def main(arguments: list[str]) -> int:
    """Build what the request file asks for; the answer file says how it went."""
    request = BuildRequest.from_json(Path(arguments[0]).read_text())
    try:
        answer = build(request)
    except (BuildFailed, BackendError, OSError, MemoryError, ImportError) as error:
        answer = {"error": str(error) or type(error).__name__}
    except (TypeError, ValueError) as error:  # the library's answer to a value it cannot take
        traceback.print_exc()
        answer = {"error": f"{request.module}: {type(error).__name__}: {error}"}
    Path(request.engine).with_name(ANSWER).write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
