"""The models of the zoo: one builder per library, each with inputs as small as the models allow.

Every entry is a name ``library/model``; ``build`` makes the module with random weights and an
example input (``zoo_huggingface`` does for transformers and diffusers). Sizes differ from the
libraries' defaults only to save time. Nothing here helps pruning: what a model is called with is
what its own documentation calls it with.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from zoo_huggingface import (
    Built,
    build_diffusers,
    build_transformers,
    diffusers_names,
    transformers_names,
)

TIMM = (  # noqa: SIM905  a list of names is read more easily like this
    "beit_base_patch16_224 halonet_h1 mobileone_s1 cait_xxs24_224 coat_tiny convit_tiny "
    "convmixer_768_32 convnext_atto cpubone_nano crossvit_tiny_240 csatv2 cs3darknet_focus_s "
    "cspnext_tiny davit_tiny deepseek_vit_412m deit_tiny_patch16_224 densenet121 dla46x_c "
    "dpn48b edgenext_xx_small efficientformer_l1 efficientformerv2_s0 mnasnet_small "
    "efficientvim_m1 efficientvit_b0 efficientvit_m0 eva02_tiny_patch14_224 fasternet_t0 "
    "fastvit_t8 focalnet_tiny_srf gcvit_xxtiny gemma4_vit_167m ghostnet_050 hardcorenas_b "
    "hgnetv2_b0 hiera_tiny_224 sam2_hiera_tiny hrnet_w18_small iformer_t inception_next_atto "
    "inception_resnet_v2 inception_v3 inception_v4 lcnetv2_small levit_128s lowformer_b0 "
    "mambaout_femto maxvit_pico_rw_256 poolformerv2_s12 gmlp_ti16_224 mobilenetv3_small_050 "
    "mobilenetv5_base mobilevit_xxs mvitv2_tiny naflexvit_base_patch16_gap nasnetalarge "
    "nest_tiny nextvit_small nf_regnet_b0 pit_ti_224 pnasnet5large pvt_v2_b0 qwen3_vit_88m "
    "rdnet_tiny regnetx_002 repghostnet_050 repvit_m1 res2next50 resnest14d resnet14t "
    "resnetv2_18 rexnet_100 selecsls42 legacy_seresnet18 sequencer2d_s shvit_s1 skresnet18 "
    "starnet_s050 swiftformer_xs swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 "
    "swinv2_cr_tiny_224 tiny_vit_5m_224 tnt_s_legacy_patch16_224 tresnet_m twins_svt_small "
    "vgg11 visformer_tiny vit_xsmall_patch16_clip_224 vit_tiny_r_s16_p8_224 "
    "vit_srelpos_small_patch16_224 samvit_base_patch16_224 vitamin_small_224 volo_d1_224 "
    "ese_vovnet19b_slim_dw legacy_xception xception41p xcit_nano_12_p8_224"
).split()
"""The model with the fewest parameters of every module of timm that registers one."""

YOLO = (  # noqa: SIM905
    "yolov3-tiny yolov3 yolov3-spp yolov5n yolov5n-p6 yolov6n yolov8n yolov8n-seg yolov8n-pose "
    "yolov8n-obb yolov8n-cls yolov8n-ghost yolov8n-p2 yolov8n-p6 yolov9t yolov9s yolov9m yolov9c "
    "yolov9e yolov9c-seg yolov10n yolov10s yolov10m yolov10b yolov10l yolov10x yolo11n "
    "yolo11n-seg yolo11n-pose yolo11n-obb yolo11n-cls yolo12n yolo12n-seg yolo12n-cls yolo26n "
    "yolo26n-seg yolo26n-pose yolo26n-obb yolo26n-cls rtdetr-l rtdetr-resnet50"
).split()

DETECTION_SIZE = 128
"""Torchvision's detectors resize what they are given; this side keeps that small."""


def names(pattern: str = "*") -> list[str]:
    """Every model of the zoo whose name matches a shell pattern."""
    found = [f"{library}/{name}" for library, (listed, _) in LIBRARIES.items() for name in listed()]
    return [name for name in found if fnmatch.fnmatch(name, pattern)]


def build(name: str) -> Built:
    """Make a model in evaluation mode, and example inputs, from a fixed seed."""
    library, _, model = name.partition("/")
    torch.manual_seed(0)
    module, example = LIBRARIES[library][1](model)
    _wake(module)
    return module.eval(), example


def _wake(module: nn.Module) -> None:
    """Give parameters that start as zeros some values, which zeros would hide errors of."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() and parameter.is_floating_point() and not parameter.any():
                parameter.normal_(0.0, 0.02)


# ---- torchvision


def _torchvision_names() -> list[str]:
    from torchvision import models

    return list(models.list_models())


TORCHVISION_OPTIONS: tuple[tuple[str, dict[str, Any], tuple[int, ...]], ...] = (
    ("alexnet", {}, (3, 224, 224)),
    ("vgg*", {}, (3, 224, 224)),
    ("vit_h_14", {"image_size": 56}, (3, 56, 56)),
    ("vit_*", {"image_size": 64}, (3, 64, 64)),
    ("maxvit_t", {}, (3, 224, 224)),
    ("*inception_v3", {}, (3, 96, 96)),
    ("mvit_*", {}, (3, 16, 224, 224)),
    ("s3d", {}, (3, 16, 224, 224)),
    ("swin3d_*", {}, (3, 8, 64, 64)),
    ("r3d_18", {}, (3, 4, 32, 32)),
    ("mc3_18", {}, (3, 4, 32, 32)),
    ("r2plus1d_18", {}, (3, 4, 32, 32)),
    ("ssd*", {}, (3, 300, 300)),
    ("*", {}, (3, 64, 64)),
)
"""Builder options and input shape by name; the first pattern that matches counts."""


def _torchvision(name: str) -> Built:
    from torchvision import models

    builder = models.get_model_builder(name)
    known = inspect.signature(builder).parameters
    options: dict[str, Any] = {"weights": None}
    options |= {k: None for k in ("weights_backbone",) if k in known}
    family = builder.__module__.removeprefix("torchvision.models.").partition(".")[0]
    pattern = next(row for row in TORCHVISION_OPTIONS if fnmatch.fnmatch(name, row[0]))
    if family == "detection":
        side = DETECTION_SIZE
        if not name.startswith("ssd"):
            options |= {"min_size": side, "max_size": side}
        return builder(**options), ([torch.rand(pattern[2]), torch.rand(pattern[2])],)
    if family == "optical_flow":
        return builder(**options), (torch.randn(1, 3, 128, 128), torch.randn(1, 3, 128, 128))
    return builder(**options, **pattern[1]), (torch.randn(1, *pattern[2]),)


# ---- timm


def _timm_names() -> list[str]:
    return list(TIMM)


def _timm(name: str) -> Built:
    import timm

    module = timm.create_model(name, pretrained=False)
    config = module.pretrained_cfg
    size = tuple(config["input_size"])
    if not config.get("fixed_input_size", False):
        least = config.get("min_input_size") or (3, 96, 96)
        side = 224 if name.startswith("vgg") else 96  # its pooling to 7x7 exports from there on
        size = (size[0], max(least[1], side), max(least[2], side))
    return module, (torch.randn(1, *size),)


# ---- ultralytics


def _ultralytics_names() -> list[str]:
    return [f"{name}.yaml" for name in YOLO]


def _ultralytics(name: str) -> Built:
    from prune2deploy.models import load

    side = 64 if "-cls" in name else 192
    loaded = load(name, input_size=(side, side))
    return loaded.module, loaded.example_inputs


# ---- Hugging Face transformers, small random configurations


LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Built]]] = {
    "torchvision": (_torchvision_names, _torchvision),
    "timm": (_timm_names, _timm),
    "ultralytics": (_ultralytics_names, _ultralytics),
    "transformers": (transformers_names, build_transformers),
    "diffusers": (diffusers_names, build_diffusers),
}
