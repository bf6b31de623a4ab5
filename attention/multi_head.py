"""Multi-head self-attention around any mechanism (Vaswani et al. 2017, arXiv:1706.03762, section 3.2.2)."""

from __future__ import annotations

from torch import Tensor, nn

from attention.registry import build_attention


class MultiHeadAttention(nn.Module):
    """Linear projections to queries, keys and values, attention in every head, and a linear output projection.

    Args:
        dim: channels C, a multiple of `num_heads`.
        attention: name of a registered mechanism.
        bias: whether the four projections have one.
        options: of the mechanism.

    Raises:
        ValueError: `num_heads` does not divide `dim`, or an unknown mechanism.
    """

    def __init__(self, dim: int, num_heads: int, attention: str = "hrr", bias: bool = False, **options: object) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim must be a multiple of num_heads; got {dim} and {num_heads}")
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim, bias=bias)
        self.key = nn.Linear(dim, dim, bias=bias)
        self.value = nn.Linear(dim, dim, bias=bias)
        self.output = nn.Linear(dim, dim, bias=bias)
        self.attention = build_attention(attention, **options)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        q, k, v = (
            projection(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, H, N, D)
            for projection in (self.query, self.key, self.value)
        )
        out = self.attention(q, k, v, key_padding_mask)  # (B, H, N, D)
        return self.output(out.transpose(1, 2).flatten(2))
