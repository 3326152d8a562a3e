"""The models of the zoo: one builder per library, each with inputs as small as the models allow.

Every entry is a name ``library/model``; ``build`` makes the module with random weights and an
example input. Sizes differ from the libraries' defaults only to save time. Nothing here helps
pruning: what a model is called with is what its own documentation calls it with.
"""

from __future__ import annotations

import fnmatch
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

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

TEXT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
IMAGE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    **TEXT,
    "num_key_value_heads": 4,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**DECODER, "num_key_value_heads": 2}
GPT2 = {
    "vocab_size": 120,
    "n_positions": 64,
    "n_embd": 64,
    "n_layer": 2,
    "n_head": 4,
    "use_cache": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OPT = {
    "vocab_size": 120,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "ffn_dim": 96,
    "use_cache": False,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "word_embed_proj_dim": 64,
}
BLOOM = {"vocab_size": 120, "hidden_size": 64, "n_layer": 2, "n_head": 4, "use_cache": False}
T5 = {
    "vocab_size": 120,
    "d_model": 64,
    "d_kv": 16,
    "d_ff": 96,
    "num_layers": 2,
    "num_heads": 4,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
SEGFORMER = {"hidden_sizes": [16, 32, 64, 96], "depths": [1, 1, 1, 1], "decoder_hidden_size": 64}
SAM = {
    "hidden_size": 64,
    "output_channels": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 64,
    "patch_size": 8,
    "window_size": 4,
    "global_attn_indexes": [1],
    "mlp_dim": 96,
    "num_pos_feats": 16,
}
WHISPER = {
    "vocab_size": 120,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "num_mel_bins": 16,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "max_source_positions": 50,
    "max_target_positions": 32,
    "use_cache": False,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
}
DETR = {
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 96,
    "decoder_ffn_dim": 96,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 10,
}

TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", TEXT, "text"),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"vocab_size": 120, "dim": 64, "n_layers": 2, "n_heads": 4, "hidden_dim": 96},
        "text",
    ),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", TEXT, "text"),
    "electra": ("ElectraConfig", "ElectraForSequenceClassification", TEXT, "text"),
    "albert": (
        "AlbertConfig",
        "AlbertForSequenceClassification",
        {**TEXT, "embedding_size": 32},
        "text",
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", IMAGE, "image"),
    "deit": ("DeiTConfig", "DeiTForImageClassification", IMAGE, "image"),
    "dinov2": ("Dinov2Config", "Dinov2ForImageClassification", {**IMAGE, "patch_size": 8}, "image"),
    "swin": ("SwinConfig", "SwinForImageClassification", SWIN, "image"),
    "llama": ("LlamaConfig", "LlamaForCausalLM", DECODER, "text"),
    "llama-gqa": ("LlamaConfig", "LlamaForCausalLM", GROUPED, "text"),
    "llama-mqa": ("LlamaConfig", "LlamaForCausalLM", {**DECODER, "num_key_value_heads": 1}, "text"),
    "mistral": ("MistralConfig", "MistralForCausalLM", GROUPED, "text"),
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", GROUPED, "text"),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**GROUPED, "head_dim": 16}, "text"),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**GROUPED, "head_dim": 16}, "text"),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", GROUPED, "text"),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", GPT2, "text"),
    "opt": ("OPTConfig", "OPTForCausalLM", OPT, "text"),
    "bloom": ("BloomConfig", "BloomForCausalLM", BLOOM, "text"),
    "t5": ("T5Config", "T5ForConditionalGeneration", T5, "text2text"),
    "sam-vision": ("SamVisionConfig", "SamVisionModel", SAM, "image"),
    "clip": (
        "CLIPConfig",
        "CLIPModel",
        {
            "text_config": {**TEXT, "eos_token_id": 2, "bos_token_id": 1},
            "vision_config": IMAGE,
            "projection_dim": 32,
        },
        "pair",
    ),
    "segformer": ("SegformerConfig", "SegformerForSemanticSegmentation", SEGFORMER, "image64"),
    "detr": ("DetrConfig", "DetrForObjectDetection", DETR, "image64"),
    "whisper": ("WhisperConfig", "WhisperForConditionalGeneration", WHISPER, "speech"),
    "convnext": (
        "ConvNextConfig",
        "ConvNextForImageClassification",
        {
            "hidden_sizes": [16, 32, 64, 96],
            "depths": [1, 1, 2, 1],
        },
        "image64",
    ),
    "resnet": (
        "ResNetConfig",
        "ResNetForImageClassification",
        {
            "embedding_size": 16,
            "hidden_sizes": [16, 32, 64, 96],
            "depths": [1, 1, 1, 1],
        },
        "image64",
    ),
    "mobilevit": (
        "MobileViTConfig",
        "MobileViTForImageClassification",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24, 32],
            "neck_hidden_sizes": [8, 8, 16, 16, 24, 32, 64],
        },
        "image64",
    ),
}
"""Name → configuration class, model class, configuration, kind of input."""


def _tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(3, 119, (1, length))


TRANSFORMERS_INPUTS: dict[str, Callable[[], dict[str, torch.Tensor]]] = {
    "text": lambda: {"input_ids": _tokens()},
    "image": lambda: {"pixel_values": torch.randn(1, 3, 32, 32)},
    "image64": lambda: {"pixel_values": torch.randn(1, 3, 64, 64)},
    "text2text": lambda: {"input_ids": _tokens(), "decoder_input_ids": _tokens(8)},
    "pair": lambda: {"input_ids": _tokens(), "pixel_values": torch.randn(1, 3, 32, 32)},
    "speech": lambda: {"input_features": torch.randn(1, 16, 100), "decoder_input_ids": _tokens(8)},
}


def _transformers_names() -> list[str]:
    return list(TRANSFORMERS)


def _transformers(name: str) -> Built:
    import transformers

    config_name, model_name, options, kind = TRANSFORMERS[name]
    config = getattr(transformers, config_name)(**options)
    if name == "detr":
        config = _detr_config(transformers, options)
    side = getattr(config, "image_size", None)
    inputs = TRANSFORMERS_INPUTS[kind]()
    if kind == "image" and isinstance(side, int):
        inputs = {"pixel_values": torch.randn(1, 3, side, side)}
    return getattr(transformers, model_name)(config), inputs


def _detr_config(transformers: Any, options: dict[str, Any]) -> Any:
    backbone = transformers.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 64, 96], depths=[1, 1, 1, 1],
        out_features=["stage4"],
    )  # fmt: skip
    return transformers.DetrConfig(
        use_timm_backbone=False, backbone=None, backbone_config=backbone,
        use_pretrained_backbone=False, **options,
    )  # fmt: skip


# ---- diffusers

DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
    "unet2d": (
        "UNet2DModel",
        {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "attention_head_dim": 8,
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
        },
    ),
    "unet2d-condition": (
        "UNet2DConditionModel",
        {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "cross_attention_dim": 24,
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "attention_head_dim": 4,
        },
    ),
    "autoencoder-kl": (
        "AutoencoderKL",
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "layers_per_block": 1,
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        },
    ),
    "dit": (
        "DiTTransformer2DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "sample_size": 8,
            "patch_size": 2,
            "num_embeds_ada_norm": 10,
            "norm_num_groups": 4,
        },
    ),
}


def _diffusers_names() -> list[str]:
    return list(DIFFUSERS)


def _diffusers(name: str) -> Built:
    import diffusers

    class_name, options = DIFFUSERS[name]
    module = getattr(diffusers, class_name)(**options)
    step = torch.tensor([3])
    inputs: dict[str, dict[str, Any]] = {
        "unet2d": {"sample": torch.randn(1, 3, 16, 16), "timestep": step},
        "unet2d-condition": {
            "sample": torch.randn(1, 4, 16, 16),
            "timestep": step,
            "encoder_hidden_states": torch.randn(1, 6, 24),
        },
        "autoencoder-kl": {"sample": torch.randn(1, 3, 16, 16)},
        "dit": {
            "hidden_states": torch.randn(1, 4, 8, 8),
            "timestep": step,
            "class_labels": torch.tensor([1]),
        },
    }
    return module, inputs[name]


LIBRARIES: dict[str, tuple[Callable[[], list[str]], Callable[[str], Built]]] = {
    "torchvision": (_torchvision_names, _torchvision),
    "timm": (_timm_names, _timm),
    "ultralytics": (_ultralytics_names, _ultralytics),
    "transformers": (_transformers_names, _transformers),
    "diffusers": (_diffusers_names, _diffusers),
}
