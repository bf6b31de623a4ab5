"""Linformer: keys and values projected along the sequence to a fixed, small number of rows.

Wang et al. 2020, "Linformer: Self-Attention with Linear Complexity", https://arxiv.org/abs/2006.04768. With learned
E, F (rank, N), head by head

    softmax(scale * q (E k)ᵀ) (F v)        (Eq. 7)

and the sharing of section 4: "none" gives every head its own E and F, "headwise" all heads one pair, "key-value" all
heads one matrix E = F. Sharing over layers is left to whoever builds the layers. E and F have a column for every
position, so there is a longest sequence; shorter ones use the first columns.

The Long Range Arena's code has one matrix of rank 16 (`sharing="key-value", rank=16`), and hides no padding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.dense import masked_attention
from attention.registry import AttentionFunction, check_inputs, register

SHARING = ("none", "headwise", "key-value")


def linformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_projection: Tensor,
    v_projection: Tensor,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """softmax(scale * q (E k)ᵀ) (F v), where masked keys and values are zeros.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        k_projection, v_projection: E and F, (H or 1, rank, L), L >= Nk.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.

    Returns:
        (B, H, Nq, Dv).

    Raises:
        ValueError: shapes that do not fit together, or more than L keys.
    """
    check_inputs("linformer", q, k, v, key_padding_mask)
    num_keys = k.shape[2]
    if num_keys > k_projection.shape[2]:
        raise ValueError(f"the projections have {k_projection.shape[2]} positions, fewer than the {num_keys} keys")
    if key_padding_mask is not None:
        hidden = key_padding_mask[:, None, :, None]
        k, v = k.masked_fill(hidden, 0.0), v.masked_fill(hidden, 0.0)
    k = k_projection[..., :num_keys].to(k.dtype) @ k  # (B, H, rank, D)
    v = v_projection[..., :num_keys].to(v.dtype) @ v  # (B, H, rank, Dv)
    return masked_attention(q, k, v, None, scale)


@register(
    "linformer",
    unequal_lengths=True,
    value_dim=True,
    causal="its projections mix keys of all positions",
    any_length="its projections have a column for every position",
    kind="approximation",
    parameters=True,
)
class LinformerAttention(AttentionFunction):
    """`linformer_attention` as a mechanism with its learned projections.

    Args:
        max_length: L, the most keys.
        num_heads: H.
        rank: rows that keys and values are projected to.
        sharing: "none", "headwise" or "key-value".
        scale: None means 1/sqrt(D).

    Raises:
        ValueError: an unknown sharing.
    """

    def __init__(
        self,
        max_length: int,
        num_heads: int,
        rank: int = 256,
        sharing: str = "headwise",
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if sharing not in SHARING:
            raise ValueError(f"unknown sharing {sharing!r}; valid ones are {', '.join(SHARING)}")
        if rank < 1:
            raise ValueError(f"rank must be positive, not {rank}")
        self.max_length, self.scale = max_length, scale
        shape = (num_heads if sharing == "none" else 1, rank, max_length)
        std = rank**-0.5  # as the Johnson-Lindenstrauss projections of the paper's theorem 2
        self.k_projection = nn.Parameter(torch.randn(shape) * std)
        self.v_projection = None if sharing == "key-value" else nn.Parameter(torch.randn(shape) * std)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        self.check_inputs(q, k, v, key_padding_mask)
        v_projection = self.k_projection if self.v_projection is None else self.v_projection
        return linformer_attention(q, k, v, self.k_projection, v_projection, self.scale, key_padding_mask)
