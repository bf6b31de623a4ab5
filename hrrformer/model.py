"""The one network of all tasks: embedding, encoder layers, pooling, readout (Alam et al. 2023, arXiv:2305.19534)."""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import HRRAttention, hrr_attention
from hrrformer.config import ModelConfig
from hrrformer.dropout import dropout
from hrrformer.layers import LAYER_NORM_EPSILON, EncoderLayer, Perceptron, sinusoids

PADDING = 0  # the token id that a mask hides


class SequenceClassifier(nn.Module):
    """Token sequences to class logits. B sequences of T tokens, N = T, or T + 1 with a class token in front; C = dim.

    Args:
        config: sizes and variations; its vocab_size, max_length and num_outputs must be known by now.
        attention: name of a registered mechanism.
        attention_options: the mechanism's.

    Raises:
        ValueError, TypeError: a size is missing, a choice unknown, or the mechanism refuses its options.
    """

    def __init__(
        self, config: ModelConfig, attention: str = "hrr", attention_options: dict[str, object] | None = None
    ) -> None:
        super().__init__()
        _check(config)
        self.config = config
        self.token_embedding = _embedding(config.vocab_size, config.dim)
        if config.positions == "learned":
            self.position_embedding = _embedding(config.max_length, config.dim)
        else:
            self.register_buffer("sinusoids", sinusoids(config.max_length, config.dim), persistent=False)
        self.embedding_norm = nn.LayerNorm(config.dim, LAYER_NORM_EPSILON) if config.embedding_norm else nn.Identity()
        if config.pooling == "cls":
            self.cls_token = nn.Parameter(torch.empty(1, 1, config.dim).normal_(std=config.dim**-0.5))
        self.layers = nn.ModuleList(
            EncoderLayer(config, attention, attention_options or {}) for _ in range(config.num_layers)
        )
        features = 4 * config.dim if config.dual_input else config.dim
        self.readout = Perceptron(features, config.dim, config.num_outputs, config.readout_activation)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int64 (B, T), or (B, 2, T) with dual input -> logits (B, num_outputs).

        Raises:
            ValueError: another shape, or more tokens than the model has positions.
        """
        if tokens.ndim != 2 + self.config.dual_input:
            raise ValueError(
                f"tokens must be {'(B, 2, T)' if self.config.dual_input else '(B, T)'}; got {tuple(tokens.shape)}"
            )
        if not self.config.dual_input:
            return self.readout(self.pool(*self.encode(tokens)))
        pooled = self.pool(*self.encode(tokens.flatten(0, 1)))  # (2B, C)
        first, second = pooled.unflatten(0, (-1, 2)).unbind(1)  # (B, C)
        return self.readout(torch.cat([first, second, first * second, first - second], dim=-1))

    def encode(self, tokens: Tensor, embedded: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """tokens int64 (B, T) -> x (B, N, C) and the padding mask, bool (B, N), True = ignored, or None.

        Args:
            embedded: (B, T, C), taken in place of the tokens' embedding.
        """
        x, mask = self.embed(tokens, embedded)
        for layer in self.layers:
            x = layer(x, mask)
        return x, mask

    def embed(self, tokens: Tensor, embedded: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """What the first layer sees; arguments and results as in `encode`."""
        config, length = self.config, tokens.shape[-1]
        if length > config.max_length:
            raise ValueError(f"sequences of {length} tokens, but the model has positions for {config.max_length}")
        positions = self.position_embedding.weight if config.positions == "learned" else self.sinusoids
        x = self.token_embedding(tokens) if embedded is None else embedded  # (B, T, C)
        x = self.embedding_norm(dropout(x + positions[:length], config.dropout, self.training))
        mask = tokens == PADDING if config.use_mask else None
        if config.pooling == "cls":
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
            mask = None if mask is None else F.pad(mask, (1, 0), value=False)
        return x, mask

    def pool(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """What `encode` returned -> (B, C). Without a mask, masked-mean is mean; with nothing but padding it is 0."""
        if self.config.pooling == "cls":
            return x[:, 0]
        if self.config.pooling == "mean" or mask is None:
            return x.mean(dim=1)
        real = (~mask).to(x.dtype)  # (B, N)
        with torch.autocast(x.device.type, enabled=False):  # the sum is of thousands of tokens
            total = torch.einsum("bn,bnc->bc", real, x)
        return total / real.sum(dim=1, keepdim=True).clamp_min(1.0)

    @torch.no_grad()
    def attention_weights(self, tokens: Tensor) -> list[Tensor]:
        """The weights w of every layer, (B, H, N): each sums to 1 over the tokens. Call it in evaluation mode.

        Raises:
            ValueError: the mechanism is not hrr: no other has one weight a token.
        """
        x, mask = self.embed(tokens)
        weights = []
        for layer in self.layers:
            projections = layer.attention
            if not isinstance(projections.attention, HRRAttention):
                raise ValueError("only hrr attention has one weight for each token")
            inputs = layer.attention_input(x)
            q, k, v = (
                projection(inputs).unflatten(-1, (projections.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
                for projection in (projections.query, projections.key, projections.value)
            )
            mask_superposition = projections.attention.mask_superposition
            weights.append(hrr_attention(q, k, v, mask, return_weights=True, mask_superposition=mask_superposition)[1])
            x = layer(x, mask)
        return weights


def _embedding(rows: int, dim: int) -> nn.Embedding:
    embedding = nn.Embedding(rows, dim)
    nn.init.normal_(embedding.weight, std=dim**-0.5)
    return embedding


def _check(config: ModelConfig) -> None:
    for name in ("vocab_size", "max_length", "num_outputs", "dim", "num_heads", "num_layers", "mlp_dim"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name} must be at least 1; got {getattr(config, name)}")
    if not 0 <= config.dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1; got {config.dropout}")
    for field in fields(config):
        choices = field.metadata["choices"]
        if choices and getattr(config, field.name) not in choices:
            raise ValueError(f"{field.name} must be one of {', '.join(choices)}; got {getattr(config, field.name)!r}")
