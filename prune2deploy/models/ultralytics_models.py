"""Models of ultralytics: a YAML (random weights) or a checkpoint of theirs.

In: ``yolov8n.yaml``, the path of a YAML, or the path of a ``.pt`` that ultralytics wrote. Out: its
network without the pre- and post-processing around it, set to give the decoded predictions alone.

A ``.pt`` of ultralytics is a pickled model: loading it runs what it holds, so name only files
that you trust. Their network access is switched off; a checkpoint must lie on this machine.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.checkpoint import VALUES, contents
from prune2deploy.models.loaded import LoadedModel, Request, nearest
from prune2deploy.models.weights import averaged

INSTALL = "pip install 'prune2deploy[yolo]'"
_QUIET = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


def load(request: Request) -> LoadedModel:
    """Build or open an ultralytics network, in eval mode with export outputs.

    The default input is 640x640 (224x224 for classification), pictures in 0..1, letterboxed.

    Raises:
        ModelError: No such YAML (the nearest names are offered) or checkpoint, or it is broken.
        MissingBackend: ultralytics is not installed.
    """
    _check_checkpoint(Path(request.name))
    with _quiet():
        wrapper = _network(request.name)
    module, task = wrapper.model, str(wrapper.task)
    set_export(module, True)
    default = 224 if task == "classify" else 640
    size = request.size((default, default))
    channels = int(module.yaml.get("channels", 3))
    return LoadedModel(
        module=module,
        example_inputs=(request.normal(channels, *size).sigmoid(),),
        spec=request.name,
        library="ultralytics",
        input_names=("images",),
        preprocessing=_preprocessing(task, size),
        notices=_notices(wrapper.ckpt),
    )


def _notices(checkpoint: Any) -> tuple[str, ...]:
    """Say that the average is taken where a checkpoint holds it beside the last weights."""
    held = [key for key in ("ema", "model") if checkpoint and checkpoint.get(key) is not None]
    return tuple(averaged(held[0], held[1:])) if held else ()


def _network(name: str) -> Any:
    try:
        ultralytics: Any = importlib.import_module("ultralytics")
        tasks: Any = importlib.import_module("ultralytics.nn.tasks")
    except ImportError as error:
        raise MissingBackend(
            f"model {name!r} needs ultralytics, which cannot be imported ({error}); "
            f"install it with: {INSTALL}"
        ) from error
    path = Path(name)
    if path.suffix != ".pt" and not path.is_file():
        folder = Path(ultralytics.__file__).parent / "cfg" / "models"
        _check_yaml(path, tasks.guess_model_scale(path), folder)
    try:
        return _wrapper(ultralytics, tasks, path)
    except Exception as error:
        raise ModelError(
            f"ultralytics cannot make a model of {name!r}: {type(error).__name__}: {error}"
        ) from error


def _check_checkpoint(path: Path) -> None:
    """Raise unless a path that stands for a checkpoint of ultralytics holds classes of theirs."""
    if path.suffix != ".pt":
        return
    if not path.is_file():
        raise ModelError(
            f"no checkpoint {str(path)!r} found; expected a file that ultralytics wrote (nothing "
            f"is downloaded); {path.stem}.yaml gives the same network with random weights"
        )
    found = contents(path)
    if any(name.startswith("ultralytics.") for name in found.classes):
        return
    here = found.kind == VALUES
    weights = f"{path}" if here else f"FILE, which {found.state} writes"
    raise ModelError(
        f"{str(path)!r} holds {found.text}; a model that is named by a file in .pt is a checkpoint "
        "of ultralytics. Name the code that makes the model, and a state dict as its weights: "
        f"--model file.py:factory --weights {weights}"
    )


def _wrapper(ultralytics: Any, tasks: Any, path: Path) -> Any:
    """Open with the one of ultralytics' classes that knows the head of the network."""
    if path.suffix == ".pt":
        return ultralytics.YOLO(str(path), verbose=False)  # chooses by what the file holds
    known = tasks.guess_model_task(tasks.yaml_model_load(path))
    return ultralytics.YOLO(str(path)) if known else ultralytics.RTDETR(str(path))


def _check_yaml(path: Path, scale: str, folder: Path) -> None:
    """Raise unless ultralytics ships ``path``; a scale letter (yolov8**n**) may be left in."""
    shipped = sorted({file.name for file in folder.rglob("*.yaml")})
    plain = path.name
    if scale:
        stem, dash, rest = path.name.partition("-")
        bare, dot, suffix = stem.partition(".")
        plain = bare.removesuffix(scale) + dot + suffix + dash + rest
    if path.name in shipped or plain in shipped:
        return
    raise ModelError(
        f"unknown model {path.name!r}: no such file here, ultralytics ships {len(shipped)} YAMLs "
        f"and {nearest(path.name, shipped)} (a letter after the version is the scale: yolov8n.yaml)"
    )


def set_export(module: nn.Module, on: bool) -> None:
    """Have the heads return decoded predictions only, as ultralytics' exporter does; in place.

    Its trainer and validator need the raw predictions too: switch off before them, on after.
    Every head that behaves differently in a deployed model declares the class attribute
    ``export``; ``format`` and ``shape`` (a cached grid) go with it.
    """
    for part in module.modules():
        declared = {name for base in type(part).__mro__ for name in vars(base)}
        if "export" not in declared:
            continue
        part.export = on  # type: ignore[assignment]
        part.format = "onnx" if on else None  # type: ignore[assignment]
        if "shape" in declared:
            part.shape = None  # type: ignore[assignment]


def _preprocessing(task: str, size: tuple[int, int]) -> Preprocessing:
    if task == "classify":
        return Preprocessing(size=size, resize=min(size), upright=True)
    return Preprocessing(size=size, letterbox=True, upright=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep standard output clean and the network untouched while ultralytics works."""
    before = {name: os.environ.get(name) for name in _QUIET}
    os.environ.update(_QUIET)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
