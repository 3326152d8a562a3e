"""Models of Hugging Face transformers from a local configuration.

In: the path of a ``config.json``, or of a folder that holds one. Out: the model class that the
configuration names (``architectures``; the base model where it names none) with random weights,
set to keep no cache. Nothing is downloaded and no code from a folder is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.loaded import LoadedModel, Request

INSTALL = "pip install 'prune2deploy[hf]'"
TOKENS = 16  # length of the example text


def load(request: Request) -> LoadedModel:
    """Build a transformers model with random weights.

    Raises:
        ModelError: The configuration is missing, broken, or of an unknown model type.
        MissingBackend: transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise MissingBackend(
            f"model 'hf:{request.name}' needs transformers, which cannot be imported ({error}); "
            f"install it with: {INSTALL}"
        ) from error
    path = Path(request.name)
    if not path.exists():
        raise ModelError(
            f"no file or folder {request.name!r} found; expected a config.json of transformers "
            "or a folder that holds one (nothing is downloaded)"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path, local_files_only=True)
        config.use_cache = False
        module = _model_class(transformers, config)(config)
    except Exception as error:
        raise ModelError(
            f"transformers cannot make a model of {request.name!r}: {type(error).__name__}: {error}"
        ) from error
    inputs = example_inputs(module, config, request)
    return LoadedModel(
        module=module.float(),
        example_inputs=tuple(inputs.values()),
        spec=f"hf:{request.name}",
        library="transformers",
        input_names=tuple(inputs),
    )


def _model_class(transformers: Any, config: Any) -> Callable[[Any], Any]:
    for name in config.architectures or ():
        return getattr(transformers, name)  # type: ignore[no-any-return]
    return transformers.AutoModel.from_config  # type: ignore[no-any-return]


def example_inputs(module: Any, config: Any, request: Request) -> dict[str, Tensor]:
    """Draw the inputs that the model's forward pass takes first, by their names.

    Text is (batch, 16) tokens, pictures (batch, channels, H, W) of the configured size, audio
    (batch, mel bins, frames) of the longest clip. A model of several inputs gets them all; an
    input between two of these that has no maker here is an error.
    """
    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: request.integers(TOKENS, _text(config).vocab_size),
        "decoder_input_ids": lambda: request.integers(TOKENS, _text(config).vocab_size),
        "attention_mask": lambda: torch.ones(request.batch, TOKENS, dtype=torch.long),
        "pixel_values": lambda: _picture(config, request),
        "input_features": lambda: request.normal(
            config.num_mel_bins, 2 * config.max_source_positions
        ),
    }
    wanted = {module.main_input_name, "input_ids", "pixel_values"}
    if config.is_encoder_decoder:
        wanted.add("decoder_input_ids")
    names = [name for name in inspect.signature(module.forward).parameters if name != "self"]
    last = max((i for i, name in enumerate(names) if name in wanted), default=-1)
    made: dict[str, Tensor] = {}
    for name in names[: last + 1]:
        if name not in makers:
            raise ModelError(
                f"'hf:{request.name}' takes {name!r} among its first inputs, which cannot be "
                "drawn here; write a factory (package.module:factory) that returns the model "
                "and its example inputs"
            )
        made[name] = makers[name]()
    return made


def _text(config: Any) -> Any:
    return config.get_text_config()


def _picture(config: Any, request: Request) -> Tensor:
    facts = {**config.to_dict(), **config.to_dict().get("vision_config", {})}
    size = facts.get("image_size") or 224
    pair = (size, size) if isinstance(size, int) else (size[0], size[1])
    channels = facts.get("num_channels") or 3
    return request.normal(int(channels), *request.size(pair))
