"""The pieces of the encoder: position embeddings, the MLP, and one layer with its three placements of the norms."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import HRRSelfAttention, MultiHeadAttention, build_attention
from hrrformer.config import ModelConfig
from hrrformer.dropout import dropout

LAYER_NORM_EPSILON = 1e-6
# Deviation of a standard normal cut off at two deviations: what the truncated initialisation divides by.
TRUNCATED_DEVIATION = 0.87962566103423978


def activate(x: Tensor, name: str) -> Tensor:
    """`gelu` (its tanh form) or `relu`."""
    return F.gelu(x, approximate="tanh") if name == "gelu" else F.relu(x)


def sinusoids(length: int, dim: int) -> Tensor:
    """(length, dim): sines at even channels, cosines at odd ones (Vaswani et al. 2017, arXiv:1706.03762, 3.5)."""
    frequencies = torch.exp(torch.arange(0, dim, 2, dtype=torch.float64) * (-math.log(10000.0) / dim))
    angles = torch.arange(length, dtype=torch.float64)[:, None] * frequencies  # (length, ceil(dim / 2))
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)[:, :dim].float()


def initialize_linear(linear: nn.Linear) -> None:
    """Weights from a truncated normal of variance 1/fan_in (LeCun et al. 1998), zero biases."""
    deviation = linear.in_features**-0.5 / TRUNCATED_DEVIATION
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


class Perceptron(nn.Module):
    """Linear, activation, linear: the MLP of a layer, and the readout.

    Args:
        output_bias: whether the second linear map has a bias; the first always has.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int, activation: str = "gelu", output_bias: bool = True
    ) -> None:
        super().__init__()
        self.activation = activation
        self.hidden = nn.Linear(dim, hidden_dim)
        self.output = nn.Linear(hidden_dim, out_dim, bias=output_bias)
        for linear in (self.hidden, self.output):
            initialize_linear(linear)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., out_dim)."""
        return self.output(activate(self.hidden(x), self.activation))


def self_attention(config: ModelConfig, attention: str, options: dict[str, object]) -> MultiHeadAttention:
    """The projections around a mechanism; for hrr the layer that may do without queries and keys."""
    sizes = config.dim, config.num_heads
    if attention == "hrr":
        build_attention("hrr", **options)  # refuses what is no option, and lists those that are
        return HRRSelfAttention(*sizes, bias=config.attention_bias, **options)
    max_length = config.max_length + (config.pooling == "cls")
    return MultiHeadAttention(*sizes, attention, config.attention_bias, **{"max_length": max_length} | options)


class EncoderLayer(nn.Module):
    """Self-attention and an MLP, each added to its input; `config.norm` says where layer norms stand.

    post:  x = LN(x + Attn(x)), x = LN(x + MLP(x)).
    pre:   x = x + Attn(LN(x)), x = x + MLP(LN(x)).
    mlp:   x = x + Attn(x),     x = x + MLP(LN(x)).

    Args:
        attention, attention_options: mechanism and its options, as `MultiHeadAttention` takes.
    """

    def __init__(self, config: ModelConfig, attention: str, attention_options: dict[str, object]) -> None:
        super().__init__()
        self.norm, self.dropout = config.norm, config.dropout
        self.attention = self_attention(config, attention, attention_options)
        for projection in self.attention.children():  # not what is inside the mechanism
            if isinstance(projection, nn.Linear):
                initialize_linear(projection)
        self.attention_norm = nn.Identity() if self.norm == "mlp" else nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.mlp_norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON)
        self.mlp = Perceptron(config.dim, config.mlp_dim, config.dim, config.mlp_activation, config.mlp_output_bias)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        x = x + self._drop(self.attention(self.attention_input(x), key_padding_mask))
        if self.norm == "post":
            x = self.attention_norm(x)
            return self.mlp_norm(x + self._drop(self.mlp(x)))
        return x + self._drop(self.mlp(self.mlp_norm(x)))

    def attention_input(self, x: Tensor) -> Tensor:
        """What the attention sees of the layer's input x."""
        return self.attention_norm(x) if self.norm == "pre" else x

    def _drop(self, x: Tensor) -> Tensor:
        return dropout(x, self.dropout, self.training)
