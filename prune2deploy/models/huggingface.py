"""Models of Hugging Face transformers from a local configuration.

In: the path of a ``config.json``, or of a folder that holds one. Out: the model class that the
configuration names (``architectures``; the base model where it names none) with random weights,
set to keep no cache, to take its inputs by position and to return a plain tuple of tensors.
Nothing is downloaded and no code from a folder is run.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from prune2deploy.errors import MissingBackend, ModelError
from prune2deploy.models.loaded import LoadedModel, Request

INSTALL = "pip install 'prune2deploy[hf]'"
TOKENS = 16  # length of the example text
_FACTORY = "write a factory (package.module:factory) that returns the model and its example inputs"
_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


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
    _take_positions(module, tuple(inputs))
    return LoadedModel(
        module=module.float(),
        example_inputs=tuple(inputs.values()),
        spec=f"hf:{request.name}",
        library="transformers",
        input_names=tuple(inputs),
    )


def _take_positions(module: Any, names: tuple[str, ...]) -> None:
    """Have ``module`` take tensors by position and return its tensors as a plain tuple.

    Exporters call by position, where transformers' forward passes have dozens of optional
    arguments between those that matter, and return dictionaries with caches. A subclass rather
    than a module around it, so that the names of the weights stay.
    """
    kind = type(module)
    taken = inspect.signature(module.forward).parameters
    masks = {ids: mask for ids, mask in _MASKS.items() if ids in names and mask in taken}

    def forward(self: Any, *inputs: Tensor) -> tuple[Tensor, ...]:
        named = dict(zip(names, inputs, strict=True))
        for ids, mask in masks.items():  # without one, packed texts are searched for
            named[mask] = torch.ones_like(named[ids])
        outputs = kind.forward(self, **named)
        return tuple(leaf for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor))

    module.__class__ = type(kind.__name__, (kind,), {"forward": forward})


def _model_class(transformers: Any, config: Any) -> Callable[[Any], Any]:
    for name in config.architectures or ():
        return getattr(transformers, name)  # type: ignore[no-any-return]
    return transformers.AutoModel.from_config  # type: ignore[no-any-return]


def example_inputs(module: Any, config: Any, request: Request) -> dict[str, Tensor]:
    """Draw the inputs that the model needs, by the names of its forward pass.

    Text is (batch, 16) tokens, pictures (batch, channels, H, W) of the configured size, audio
    (batch, mel bins, frames) of the longest clip. A model of several inputs gets them all.

    Raises:
        ModelError: The main input is of another kind, or its size is not told.
    """

    def told(of: Any, name: str) -> int:
        try:
            return int(getattr(of, name))
        except (AttributeError, TypeError) as error:
            raise ModelError(
                f"'hf:{request.name}': found no {name!r} in its configuration, expected it to say "
                f"how large {module.main_input_name!r} is; {_FACTORY}"
            ) from error

    makers: dict[str, Callable[[], Tensor]] = {
        "input_ids": lambda: request.integers(TOKENS, told(_text(config), "vocab_size")),
        "pixel_values": lambda: _picture(config, request),
        "input_features": lambda: request.normal(
            told(config, "num_mel_bins"), 2 * told(config, "max_source_positions")
        ),
        "decoder_input_ids": lambda: request.integers(TOKENS, told(_text(config), "vocab_size")),
    }
    if module.main_input_name not in makers:
        raise ModelError(
            f"'hf:{request.name}' takes {module.main_input_name!r}; expected one of "
            f"{', '.join(makers)}; {_FACTORY}"
        )
    taken = inspect.signature(module.forward).parameters
    if not config.is_encoder_decoder:
        del makers["decoder_input_ids"]
    return {name: make() for name, make in makers.items() if name in taken}


def _text(config: Any) -> Any:
    return config.get_text_config()


def _picture(config: Any, request: Request) -> Tensor:
    facts = {**config.to_dict(), **config.to_dict().get("vision_config", {})}
    size = facts.get("image_size") or 224
    pair = (size, size) if isinstance(size, int) else (size[0], size[1])
    channels = facts.get("num_channels") or 3
    return request.normal(int(channels), *request.size(pair))
