"""timm's models by name.

In: what follows ``timm:``. Out: the model with random weights, with inputs and preprocessing from
its own pretrained configuration (``timm.data.resolve_model_data_config``).
"""

from __future__ import annotations

import importlib
import math
from typing import Any

from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.loaded import LoadedModel, Request, nearest

INSTALL = "pip install 'prune2deploy[timm]'"
_INTERPOLATIONS = ("nearest", "bilinear", "bicubic")


def load(request: Request) -> LoadedModel:
    """Build a timm model with random weights.

    Raises:
        ModelError: timm has no model of that name; the nearest names are offered.
        MissingBackend: timm is not installed.
    """
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise MissingBackend(
            f"model 'timm:{request.name}' needs timm, which cannot be imported ({error}); "
            f"install it with: {INSTALL}"
        ) from error
    if not timm.is_model(request.name):
        names = timm.list_models()
        raise ModelError(
            f"unknown model 'timm:{request.name}': timm has {len(names)} models and "
            f"{nearest(request.name, names)}"
        )
    module = timm.create_model(request.name, pretrained=False, **_options(timm, request))
    data = timm.data.resolve_model_data_config(module)
    channels, height, width = data["input_size"]
    size = request.size((height, width))
    return LoadedModel(
        module=module,
        example_inputs=(request.normal(channels, *size),),
        spec=f"timm:{request.name}",
        library="timm",
        preprocessing=_preprocessing(data, size, channels),
    )


def _options(timm: Any, request: Request) -> dict[str, Any]:
    """Tell models whose input size is part of their weights which size is wanted."""
    config = timm.get_pretrained_cfg(request.name)
    if request.input_size is None or config is None or not config.fixed_input_size:
        return {}
    return {"img_size": request.input_size}


def _preprocessing(data: dict[str, Any], size: tuple[int, int], channels: int) -> Preprocessing:
    interpolation = data["interpolation"]
    squashed = data.get("crop_mode") == "squash"  # whatever the proportions, mostly uncut
    return Preprocessing(
        size=size,
        resize=None if squashed else math.floor(min(size) / data["crop_pct"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        channel_order="gray" if channels == 1 else "rgb",
        interpolation=interpolation if interpolation in _INTERPOLATIONS else "bicubic",
    )
