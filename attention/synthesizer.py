"""Synthesizer: attention weights that no product of queries and keys makes.

Tay et al. 2020, "Synthesizer: Rethinking Self-Attention in Transformer Models", https://arxiv.org/abs/2005.00743.
Y = softmax(B) G(X), where G is the projection to values and the scores B (N, N) of a head are

    "random"             a learned matrix R, the same for all inputs                   (Eq. 4)
    "factorized-random"  R1 R2ᵀ, two learned matrices of few columns                   (Eq. 7)
    "dense"              a row for each token: W2 relu(W1 x_i + b1) + b2               (Eqs. 1 to 3)

There is a score for every position, so there is a longest sequence; shorter ones use the first. With `dot_product` the
scores q·k / sqrt(D) of projected queries and keys are added, as in the paper's mixtures of Synthesizers, with equal
weights. The Long Range Arena's Synthesizer is that with the random scores.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.fnet import SELF_ATTENTION
from attention.registry import check_tokens, register

VARIANTS = ("random", "factorized-random", "dense")


@register(
    "synthesizer",
    unequal_lengths=SELF_ATTENTION,
    value_dim=SELF_ATTENTION,
    causal=True,
    any_length="it has scores for every position",
    memory="N^2",
    parameters=True,
    layer=True,
)
class SynthesizerAttention(nn.Module):
    """Synthesizer attention as a layer, with its projections to values and to the output.

    Args:
        dim: channels C, a multiple of `num_heads`.
        max_length: L, the most tokens.
        variant: "random", "factorized-random" or "dense".
        rank: columns of R1 and R2 of "factorized-random"; the paper's 8.
        bias: whether the projections of values and output have one.
        causal: token i takes values up to i.
        dot_product: adds the scores of softmax attention, with projections to queries and keys.

    Raises:
        ValueError: an unknown variant.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        max_length: int,
        variant: str = "random",
        rank: int = 8,
        bias: bool = False,
        causal: bool = False,
        dot_product: bool = False,
    ) -> None:
        super().__init__()
        if variant not in VARIANTS:
            raise ValueError(f"unknown variant {variant!r}; valid ones are {', '.join(VARIANTS)}")
        self.dim, self.num_heads, self.max_length = dim, num_heads, max_length
        self.variant, self.causal = variant, causal
        self.value = nn.Linear(dim, dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)
        if variant == "random":
            self.scores = nn.Parameter(torch.randn(num_heads, max_length, max_length) * dim**-0.5)
        elif variant == "factorized-random":
            self.rows = nn.Parameter(torch.randn(num_heads, max_length, rank) * rank**-0.5)
            self.columns = nn.Parameter(torch.randn(num_heads, max_length, rank))
        else:
            head_dim = dim // num_heads
            self.hidden = nn.Linear(dim, dim)  # W1 of all heads
            self.row_weight = nn.Parameter(torch.randn(num_heads, max_length, head_dim) * head_dim**-0.5)  # W2
            self.row_bias = nn.Parameter(torch.zeros(num_heads, 1, max_length))
        self.query = nn.Linear(dim, dim, bias=bias) if dot_product else None
        self.key = nn.Linear(dim, dim, bias=bias) if dot_product else None

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _scores(self, x: Tensor) -> Tensor:
        """(B or 1, H, N, N)."""
        scores = self._synthetic_scores(x)
        if self.query is None:
            return scores
        q, k = self._heads(self.query(x)), self._heads(self.key(x))
        return scores + q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5

    def _synthetic_scores(self, x: Tensor) -> Tensor:
        """(B or 1, H, N, N)."""
        n = x.shape[1]
        if self.variant == "random":
            return self.scores[None, :, :n, :n]
        if self.variant == "factorized-random":
            return (self.rows[:, :n] @ self.columns[:, :n].transpose(-1, -2))[None]
        hidden = self._heads(F.relu(self.hidden(x)))  # (B, H, N, D)
        return hidden @ self.row_weight[:, :n].transpose(-1, -2) + self.row_bias[..., :n]

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        check_tokens(self.name, x, self.dim, key_padding_mask, self.max_length)
        n = x.shape[1]
        hidden = torch.zeros(1, 1, 1, n, dtype=torch.bool, device=x.device)
        if key_padding_mask is not None:
            hidden = hidden | key_padding_mask[:, None, None]
        if self.causal:
            hidden = hidden | torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        scores = self._scores(x).float() if x.dtype != torch.float64 else self._scores(x)
        weights = scores.masked_fill(hidden, -1e30).softmax(-1).masked_fill(hidden, 0.0)  # (B or 1, H, N, N)
        v = self._heads(self.value(x))  # (B, H, N, D)
        return self.output((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
