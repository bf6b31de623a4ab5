"""Dense softmax attention, by torch's scaled_dot_product_attention: softmax(q kᵀ / sqrt(D)) v.

Vaswani et al. 2017, "Attention Is All You Need", https://arxiv.org/abs/1706.03762, Eq. 1.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from attention.registry import AttentionFunction, check_inputs, register


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * q kᵀ) v.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.
        dropout: probability of dropping an attention weight.
        causal: query i sees the keys up to i; wants as many keys as queries.

    Returns:
        (B, H, Nq, Dv). A query that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_inputs("dense", q, k, v, key_padding_mask)
    if causal and q.shape[2] != k.shape[2]:
        raise ValueError(f"causal attention needs as many keys as queries, not {k.shape[2]} for {q.shape[2]}")
    visible = None if key_padding_mask is None else ~key_padding_mask[:, None, None]  # (B, 1, 1, Nk)
    if causal and visible is not None:
        visible = visible & visible.new_ones(q.shape[2], k.shape[2]).tril()  # (B, 1, Nq, Nk)
    return masked_attention(q, k, v, visible, scale, dropout, causal=causal and visible is None)


def masked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    visible: Tensor | None,
    scale: float | None = None,
    dropout: float = 0.0,
    causal: bool = False,
) -> Tensor:
    """softmax(scale * q kᵀ) v over the visible keys, by a fused kernel where torch has one.

    Args:
        q: (S, H, M, D).  k: (S, H, N, D).  v: (S, H, N, Dv).
        visible: bool, broadcast to (S, H, M, N), True = attended to; None = all.
        causal: the lower triangle, in the place of `visible`.

    Returns:
        (S, H, M, Dv). A query that sees no key gets zeros.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    value_dim = v.shape[-1]
    if q.device.type == "cpu" and q.shape[-1] != value_dim:
        # The CPU's fused kernel wants one head size; without it the call would store all scores. Zeros change nothing.
        head_dim = max(q.shape[-1], value_dim)
        q, k, v = (F.pad(x, (0, head_dim - x.shape[-1])) for x in (q, k, v))
    if visible is None:
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal, scale=scale)
        return out[..., :value_dim]
    # A query without keys attends to all of them and is zeroed afterwards: no kernel ever sees a softmax over nothing.
    empty = ~visible.any(dim=-1, keepdim=True)  # (S, H, M, 1), or what broadcasts to it
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible | empty, dropout_p=dropout, scale=scale)
    return out[..., :value_dim].masked_fill(empty, 0.0)


@register("dense", unequal_lengths=True, value_dim=True, causal=True, kind="exact")
class DenseAttention(AttentionFunction):
    """`dense_attention` as a mechanism: the exact softmax over all keys, without parameters.

    Args:
        scale: None means 1/sqrt(D).
        dropout: probability of dropping an attention weight while training.
        causal: query i sees the keys up to i.
    """

    def __init__(self, scale: float | None = None, dropout: float = 0.0, causal: bool = False) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        dropout = self.dropout if self.training else 0.0
        return dense_attention(q, k, v, self.scale, key_padding_mask, dropout, self.causal)
