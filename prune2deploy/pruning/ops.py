"""Layer types, as ``tp.ops``."""

from __future__ import annotations

from torch import nn

TORCH_CONV = nn.modules.conv._ConvNd
TORCH_LINEAR = nn.Linear
TORCH_BATCHNORM = nn.modules.batchnorm._BatchNorm
TORCH_INSTANCENORM = nn.modules.instancenorm._InstanceNorm
TORCH_LAYERNORM = nn.LayerNorm
TORCH_GROUPNORM = nn.GroupNorm
TORCH_PRELU = nn.PReLU
TORCH_EMBED = nn.Embedding
TORCH_PARAMETER = nn.Parameter
TORCH_MHA = nn.MultiheadAttention
TORCH_LSTM = nn.LSTM
