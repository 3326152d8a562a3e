"""Torchvision's builders by name: classification, detection, segmentation, video, optical flow.

In: a builder's name (``resnet50``). Out: the model with random weights, and inputs as its family
takes them. Names and families are torchvision's own (``torchvision.models.list_models``).
"""

from __future__ import annotations

import functools
import inspect
import warnings
from typing import Any

from torch import Tensor, nn

from prune2deploy.calibration.preprocessing import Preprocessing
from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.loaded import LoadedModel, Request, nearest

VIDEO_FRAMES = 16  # what torchvision's video weights were trained with
INSTALL = "pip install 'prune2deploy[vision]'"


def load(request: Request) -> LoadedModel:
    """Build a torchvision model with random weights.

    Raises:
        ModelError: Torchvision has no builder of that name; the nearest names are offered.
        MissingBackend: Torchvision is not installed.
    """
    try:
        from torchvision import models
    except ImportError as error:
        raise MissingBackend(
            f"model {request.name!r} needs torchvision, which cannot be imported ({error}); "
            f"install it with: {INSTALL}"
        ) from error
    names = models.list_models()
    if request.name not in names:
        raise ModelError(_unknown(request.name, names))
    builder = models.get_model_builder(request.name)
    options: dict[str, Any] = {"weights": None}
    if "weights_backbone" in inspect.signature(builder).parameters:
        options["weights_backbone"] = None  # otherwise it would be downloaded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # on initialisation, of two old models
        module = builder(**options)
    preset = _preset(models.get_model_weights(request.name))
    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    size, inputs, names_in = _inputs(family, preset, module, request)
    return LoadedModel(
        module=module,
        example_inputs=inputs,
        spec=request.name,
        library="torchvision",
        input_names=names_in,
        preprocessing=_preprocessing(preset, size),
    )


def _unknown(name: str, names: list[str]) -> str:
    return (
        f"unknown model {name!r}: torchvision has {len(names)} builders and "
        f"{nearest(name, names)}; other libraries are reached by timm:NAME, NAME.yaml "
        "(ultralytics), hf:CONFIG, package.module:factory, file.py:factory or FILE.pt2"
    )


def _preset(weights: Any) -> dict[str, Any]:
    """Return the arguments of the transforms that torchvision's first weights come with."""
    for entry in weights:
        transforms = entry.transforms
        if isinstance(transforms, functools.partial):
            defaults = inspect.signature(transforms.func).parameters
            known = {k: p.default for k, p in defaults.items() if p.default is not p.empty}
            return {**known, **transforms.keywords}
    return {}


def _inputs(
    family: str, preset: dict[str, Any], module: nn.Module, request: Request
) -> tuple[tuple[int, int], tuple[Tensor, ...], tuple[str, ...]]:
    """Return the input size, example inputs and their names for one of torchvision's families."""
    if family == "video":
        size = request.size(_pair(preset.get("crop_size", 224)))
        return size, (request.normal(3, VIDEO_FRAMES, *size),), ("video",)
    if family == "optical_flow":
        size = request.size((224, 224))
        both = request.normal(6, *size)
        return size, (both[:, :3].contiguous(), both[:, 3:].contiguous()), ("image1", "image2")
    if family == "detection":  # takes anything that iterates over (3, H, W) pictures in 0..1
        size = request.size((320, 320))
        return size, (request.normal(3, *size).sigmoid(),), ("images",)
    if family == "segmentation":
        size = request.size(_pair(preset.get("resize_size", 520)))
        return size, (request.normal(3, *size),), ("input",)
    built_for = vars(module).get("image_size")  # a ViT takes this size alone, whatever the weights
    size = request.size(_pair(built_for or preset.get("crop_size", 224)))
    return size, (request.normal(3, *size),), ("input",)


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return value[0], value[-1]


def _preprocessing(preset: dict[str, Any], size: tuple[int, int]) -> Preprocessing:
    if "mean" not in preset:  # detection: the model itself normalises and resizes
        return Preprocessing(size=size)
    resize = None
    if "crop_size" in preset:  # keep the trained proportion of shorter side to crop
        ratio = _pair(preset["resize_size"])[0] / _pair(preset["crop_size"])[0]
        resize = round(min(size) * ratio)
    return Preprocessing(
        size=size,
        resize=resize,
        mean=tuple(preset["mean"]),
        std=tuple(preset["std"]),
        interpolation=preset["interpolation"].value,
    )
