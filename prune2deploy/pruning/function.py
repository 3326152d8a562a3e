"""Low-level pruning: removes channels from one layer, in place, and leaves its neighbours alone.

Each layer type has a ``BasePruningFunc``; ``prune_conv_out_channels`` and its like are its bound
methods. ``idxs`` are the positions to *remove*. Neighbouring layers, which no longer fit, are
pruned by the groups of a ``DependencyGraph``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import nn

from prune2deploy.errors import PruneError
from prune2deploy.pruning.layers import (
    BasePruningFunc,
    ConvPruner,
    DepthwiseConvPruner,
    LinearPruner,
    cut,
    kept,
)
from prune2deploy.surgery.slicing import sliced

__all__ = [
    "prune_batchnorm_in_channels",
    "prune_batchnorm_out_channels",
    "prune_conv_in_channels",
    "prune_conv_out_channels",
    "prune_depthwise_conv_in_channels",
    "prune_depthwise_conv_out_channels",
    "prune_embedding_in_channels",
    "prune_embedding_out_channels",
    "prune_groupnorm_in_channels",
    "prune_groupnorm_out_channels",
    "prune_instancenorm_in_channels",
    "prune_instancenorm_out_channels",
    "prune_layernorm_in_channels",
    "prune_layernorm_out_channels",
    "prune_linear_in_channels",
    "prune_linear_out_channels",
    "prune_lstm_in_channels",
    "prune_lstm_out_channels",
    "prune_multihead_attention_in_channels",
    "prune_multihead_attention_out_channels",
    "prune_parameter_in_channels",
    "prune_parameter_out_channels",
    "prune_prelu_in_channels",
    "prune_prelu_out_channels",
]


class _PerChannel(BasePruningFunc):
    """Layers that treat each channel by itself: one attribute says how many there are."""

    attribute: ClassVar[str]

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove channels."""
        size = self.get_out_channels(layer)
        if size is None:
            return layer
        left = len(kept(size, idxs))
        for name in ("weight", "bias", "running_mean", "running_var"):
            cut(layer, name, 0, idxs)
        setattr(layer, self.attribute, left)
        return layer

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """The same as removing output channels."""
        return self.prune_out_channels(layer, idxs)

    def get_out_channels(self, layer: Any) -> int | None:
        """Channels."""
        return int(getattr(layer, self.attribute))

    def get_in_channels(self, layer: Any) -> int | None:
        """Channels."""
        return self.get_out_channels(layer)


class BatchnormPruner(_PerChannel):
    """Batch normalisation of any rank, with or without affine parameters and statistics."""

    TARGET_MODULES = (nn.modules.batchnorm._BatchNorm,)
    attribute = "num_features"


class InstanceNormPruner(_PerChannel):
    """Instance normalisation."""

    TARGET_MODULES = (nn.modules.instancenorm._InstanceNorm,)
    attribute = "num_features"


class GroupNormPruner(_PerChannel):
    """Group normalisation; the number of groups stays."""

    TARGET_MODULES = (nn.GroupNorm,)
    attribute = "num_channels"

    def get_in_channel_groups(self, layer: Any) -> int:
        """Groups."""
        return int(layer.num_groups)

    get_out_channel_groups = get_in_channel_groups


class PReLUPruner(_PerChannel):
    """PReLU with one slope per channel; a shared slope is left alone."""

    TARGET_MODULES = (nn.PReLU,)
    attribute = "num_parameters"

    def get_out_channels(self, layer: Any) -> int | None:
        """Channels, or ``None`` for a shared slope."""
        return None if layer.num_parameters == 1 else int(layer.num_parameters)


class LayernormPruner(BasePruningFunc):
    """Layer and RMS normalisation, in ``pruning_dim`` of the normalised shape (the last)."""

    TARGET_MODULES = (nn.LayerNorm, nn.RMSNorm)

    def __init__(self, pruning_dim: int = -1) -> None:
        super().__init__(pruning_dim)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove normalised positions."""
        shape = list(layer.normalized_shape)
        shape[self.pruning_dim] = len(kept(shape[self.pruning_dim], idxs))
        for name in ("weight", "bias"):
            cut(layer, name, self.pruning_dim, idxs)
        layer.normalized_shape = tuple(shape)
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Normalised positions."""
        return int(layer.normalized_shape[self.pruning_dim])

    get_in_channels = get_out_channels


class EmbeddingPruner(BasePruningFunc):
    """Embeddings lose width, never rows."""

    TARGET_MODULES = (nn.Embedding, nn.EmbeddingBag)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove columns."""
        cut(layer, "weight", 1, idxs)
        layer.embedding_dim = layer.weight.shape[1]
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Width."""
        return int(layer.embedding_dim)

    get_in_channels = get_out_channels


class ParameterPruner(BasePruningFunc):
    """Bare parameters: the pruned one is returned, since a parameter cannot shrink in place."""

    TARGET_MODULES = (nn.Parameter,)

    def __init__(self, pruning_dim: int = -1) -> None:
        super().__init__(pruning_dim)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove positions of ``pruning_dim``."""
        places: list[Any] = [None] * layer.dim()
        places[self.pruning_dim] = kept(layer.shape[self.pruning_dim], idxs)
        return sliced(layer, places)

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Positions of ``pruning_dim``."""
        return int(layer.shape[self.pruning_dim])

    get_in_channels = get_out_channels


class MultiheadAttentionPruner(BasePruningFunc):
    """``nn.MultiheadAttention``: the embedding and the width of the heads shrink together."""

    TARGET_MODULES = (nn.MultiheadAttention,)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove embedding channels from q, k, v and the output projection."""
        size = layer.embed_dim
        left = len(kept(size, idxs))
        if left % layer.num_heads:
            raise PruneError(
                f"{left} of {size} channels would stay, which {layer.num_heads} heads cannot "
                f"share; remove a multiple of {layer.num_heads}"
            )
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            cut(layer, name, 0, idxs)
        thrice = [block * size + idx for block in range(3) for idx in idxs]
        for name, dim, gone in (
            ("in_proj_weight", 0, thrice),
            ("in_proj_weight", 1, idxs),
            ("in_proj_bias", 0, thrice),
            ("bias_k", 2, idxs),
            ("bias_v", 2, idxs),
        ):
            cut(layer, name, dim, gone)
        LINEAR.prune_out_channels(layer.out_proj, idxs)
        LINEAR.prune_in_channels(layer.out_proj, idxs)
        layer.embed_dim = left
        layer.head_dim = left // layer.num_heads
        if layer._qkv_same_embed_dim:
            layer.kdim = layer.vdim = left
        return layer

    prune_in_channels = prune_out_channels

    def get_out_channels(self, layer: Any) -> int:
        """Embedding width."""
        return int(layer.embed_dim)

    get_in_channels = get_out_channels


class LSTMPruner(BasePruningFunc):
    """LSTM and GRU of one layer, in one or both directions, without projection."""

    TARGET_MODULES = (nn.LSTM, nn.GRU)

    def prune_out_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove hidden units: their rows in every gate, and their columns in the recurrence."""
        if layer.num_layers != 1 or layer.proj_size:
            raise PruneError(
                f"found {layer.num_layers} layers and projection {layer.proj_size}; hidden units "
                "can be removed from one layer without projection"
            )
        size = layer.hidden_size
        left = len(kept(size, idxs))
        gates = layer.weight_hh_l0.shape[0] // size
        rows = [gate * size + idx for gate in range(gates) for idx in idxs]
        for end in _ends(layer):
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                cut(layer, f"{name}_l0{end}", 0, rows)
            cut(layer, f"weight_hh_l0{end}", 1, idxs)
        layer.hidden_size = left
        return _renew(layer)

    def prune_in_channels(self, layer: Any, idxs: Sequence[int]) -> Any:
        """Remove input features."""
        for end in _ends(layer):
            cut(layer, f"weight_ih_l0{end}", 1, idxs)
        layer.input_size = layer.weight_ih_l0.shape[1]
        return _renew(layer)

    def get_out_channels(self, layer: Any) -> int:
        """Hidden units of one direction."""
        return int(layer.hidden_size)

    def get_in_channels(self, layer: Any) -> int:
        """Input features."""
        return int(layer.input_size)


def _ends(layer: Any) -> tuple[str, ...]:
    return ("", "_reverse") if layer.bidirectional else ("",)


def _renew(layer: Any) -> Any:
    """Let the layer's flat list of weights hold the new ones."""
    for name in layer._flat_weights_names:
        setattr(layer, name, getattr(layer, name))
    return layer


CONV, DEPTHWISE_CONV, LINEAR = ConvPruner(), DepthwiseConvPruner(), LinearPruner()
BATCHNORM, LAYERNORM, GROUPNORM = BatchnormPruner(), LayernormPruner(), GroupNormPruner()
INSTANCENORM, PRELU, EMBEDDING = InstanceNormPruner(), PReLUPruner(), EmbeddingPruner()
PARAMETER, MULTIHEAD_ATTENTION, LSTM = ParameterPruner(), MultiheadAttentionPruner(), LSTMPruner()

prune_conv_out_channels = CONV.prune_out_channels
prune_conv_in_channels = CONV.prune_in_channels
prune_depthwise_conv_out_channels = DEPTHWISE_CONV.prune_out_channels
prune_depthwise_conv_in_channels = DEPTHWISE_CONV.prune_in_channels
prune_batchnorm_out_channels = BATCHNORM.prune_out_channels
prune_batchnorm_in_channels = BATCHNORM.prune_in_channels
prune_linear_out_channels = LINEAR.prune_out_channels
prune_linear_in_channels = LINEAR.prune_in_channels
prune_prelu_out_channels = PRELU.prune_out_channels
prune_prelu_in_channels = PRELU.prune_in_channels
prune_layernorm_out_channels = LAYERNORM.prune_out_channels
prune_layernorm_in_channels = LAYERNORM.prune_in_channels
prune_embedding_out_channels = EMBEDDING.prune_out_channels
prune_embedding_in_channels = EMBEDDING.prune_in_channels
prune_parameter_out_channels = PARAMETER.prune_out_channels
prune_parameter_in_channels = PARAMETER.prune_in_channels
prune_multihead_attention_out_channels = MULTIHEAD_ATTENTION.prune_out_channels
prune_multihead_attention_in_channels = MULTIHEAD_ATTENTION.prune_in_channels
prune_groupnorm_out_channels = GROUPNORM.prune_out_channels
prune_groupnorm_in_channels = GROUPNORM.prune_in_channels
prune_instancenorm_out_channels = INSTANCENORM.prune_out_channels
prune_instancenorm_in_channels = INSTANCENORM.prune_in_channels
prune_lstm_out_channels = LSTM.prune_out_channels
prune_lstm_in_channels = LSTM.prune_in_channels
