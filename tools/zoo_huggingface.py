"""The models of the zoo that come from transformers and diffusers: small ones of every kind.

Out: names, and for each a module with random weights and what it is called with.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]

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


def transformers_names() -> list[str]:
    """Models of transformers, by the names that the zoo gives them."""
    return list(TRANSFORMERS)


def build_transformers(name: str) -> Built:
    """One of them with random weights, and its inputs by name."""
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


def diffusers_names() -> list[str]:
    """Models of diffusers, by the names that the zoo gives them."""
    return list(DIFFUSERS)


def build_diffusers(name: str) -> Built:
    """One of them with random weights, and its inputs by name."""
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
