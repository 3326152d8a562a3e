"""Which loader a model's name belongs to, and what they all have in common.

In: a name and what the example inputs should be like. Out: a :class:`LoadedModel` in eval mode,
float32, on the CPU, with weights that are random by a fixed seed or come from a file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from prune2deploy.errors import ModelError
from prune2deploy.models import (
    archive,
    factory,
    files,
    huggingface,
    timm_models,
    torchvision_models,
    ultralytics_models,
)
from prune2deploy.models.loaded import LoadedModel, Request
from prune2deploy.models.weights import load_weights
from prune2deploy.modes import let_switch

MOST_PIXELS = 2**31 - 1  # of one input, all samples together; runtimes count them in 32 bits


@dataclass(frozen=True)
class Loader:
    """One row of the table of loaders.

    Attributes:
        form: What its names look like, for messages; empty where they name no model.
        prefix: Its names start with this, which is cut off.
        suffixes: Its names end with one of these; empty for any.
        contains: Its names contain this.
        load: Makes the model.
        random: Its models have random weights unless a file of weights is named.
    """

    form: str
    load: Callable[[Request], LoadedModel]
    prefix: str = ""
    suffixes: tuple[str, ...] = ()
    contains: str = ""
    random: bool = False

    def matches(self, spec: str) -> bool:
        """Say whether ``spec`` is a name of this loader's."""
        return (
            spec.startswith(self.prefix)
            and (not self.suffixes or spec.endswith(self.suffixes))
            and self.contains in spec
        )


LOADERS: tuple[Loader, ...] = (  # the first that matches is taken
    Loader("timm:NAME", timm_models.load, prefix="timm:", random=True),
    Loader("hf:CONFIG_OR_FOLDER", huggingface.load, prefix="hf:", random=True),
    Loader("FILE.pt2", archive.load, suffixes=(".pt2",)),
    Loader("yolov8n.yaml", ultralytics_models.load, suffixes=(".yaml", ".yml"), random=True),
    Loader("FILE.pt of ultralytics", ultralytics_models.load, suffixes=(".pt",)),
    Loader("package.module:factory, file.py:factory", factory.load, contains=":"),
    Loader("", files.refuse, suffixes=files.SUFFIXES),
    Loader("resnet50 (any torchvision builder)", torchvision_models.load, random=True),
)


def load(
    spec: str,
    *,
    weights: Path | None = None,
    input_size: tuple[int, int] | None = None,
    batch: int = 1,
    seed: int = 0,
) -> LoadedModel:
    """Load a model by name.

    Args:
        spec: ``resnet50`` (torchvision), ``timm:NAME``, ``yolov8n.yaml`` or ``FILE.pt``
            (ultralytics), ``hf:CONFIG_OR_FOLDER``, ``package.module:factory``,
            ``file.py:factory`` or ``FILE.pt2``.
        weights: A state dict to fill the model with; without it the weights are what the loader
            gives, random by ``seed`` where it has none.
        input_size: Height and width of the example input; ``None`` takes the library's own.
        batch: Size of the batch dimension of the example inputs.
        seed: For random weights and random example inputs; the global random state of torch
            is left as it is.

    Raises:
        ModelError: The name, the weights or the model behind them are wrong.
        MissingBackend: The library that makes the model is not installed.
    """
    _require(spec, input_size, batch)
    loader = next(loader for loader in LOADERS if loader.matches(spec))
    request = Request(spec.removeprefix(loader.prefix), input_size, batch, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        loaded = loader.load(request)
    _require_size(loaded, input_size)
    notices = loaded.notices if weights is None else load_weights(loaded.module, weights)
    module, inputs = _settled(loaded.module, loaded.example_inputs)
    return replace(
        loaded,
        module=module,
        example_inputs=inputs,
        spec=spec,
        random=loader.random and weights is None,
        notices=notices,
    )


def _require(spec: str, input_size: tuple[int, int] | None, batch: int) -> None:
    name = spec.partition(":")[2] if spec.startswith(("timm:", "hf:")) else spec
    if not name.strip():
        forms = ", ".join(loader.form for loader in LOADERS if loader.form)
        raise ModelError(f"model: found {spec!r}, expected one of: {forms}")
    if batch < 1:
        raise ModelError(f"batch: found {batch}, expected 1 or more")
    if input_size is not None and min(input_size) < 1:
        raise ModelError(f"input size: found {input_size}, expected HEIGHTxWIDTH of 1 or more")
    height, width = input_size or (1, 1)
    if batch * height * width > MOST_PIXELS:
        raise ModelError(
            f"batch {batch} of inputs of {height}x{width}: found {batch * height * width} pixels, "
            f"expected at most {MOST_PIXELS} in all; give a smaller --batch or --input-size"
        )


def _require_size(loaded: LoadedModel, input_size: tuple[int, int] | None) -> None:
    """Raise ModelError where a size is asked for and no input is a picture of it."""
    shapes = [tuple(one.shape) for one in loaded.example_inputs]
    if input_size is None or any(len(s) >= 4 and s[-2:] == input_size for s in shapes):
        return
    raise ModelError(
        f"input size: found {input_size}, but {loaded.spec!r} takes inputs of shape "
        f"{', '.join(map(str, shapes))}, which it cannot change; leave --input-size out, or make "
        "the model with inputs of that size"
    )


def _settled(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """Return the module in eval mode; it and its inputs on the CPU, floating point as float32."""
    let_switch(module)
    empty = [name for name, held in module.named_parameters() if held.is_meta]
    if empty:
        raise ModelError(
            f"model: found {empty[0]} on the device 'meta', expected weights with values; make the "
            "model on a device that holds them"
        )
    if isinstance(module.eval(), torch.fx.GraphModule):
        return module, inputs  # its operators may have device and precision written into them
    moved = tuple(
        one.to("cpu", torch.float32 if one.is_floating_point() else one.dtype) for one in inputs
    )
    return module.to(device="cpu", dtype=torch.float32), moved
