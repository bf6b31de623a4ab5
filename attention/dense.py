"""Dense softmax attention by torch's scaled_dot_product_attention (Vaswani et al. 2017, arXiv:1706.03762, Eq. 1)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from attention.registry import check_inputs, check_lengths, register


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(scale * q kᵀ) v.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, Nq, Dv). Batch rows whose keys are all masked get zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_inputs("dense", q, k, v, key_padding_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    value_dim = v.shape[-1]
    if q.device.type == "cpu" and q.shape[-1] != value_dim:
        # The CPU's fused kernel wants one head size; without it the call would store all scores. Zeros change nothing.
        head_dim = max(q.shape[-1], value_dim)
        q, k, v = (F.pad(x, (0, head_dim - x.shape[-1])) for x in (q, k, v))
    if key_padding_mask is None:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scale)[..., :value_dim]
    # A row without keys attends to all of them and is zeroed afterwards: no kernel ever sees a softmax over nothing.
    empty = key_padding_mask.all(dim=1)  # (B,)
    visible = (~key_padding_mask | empty[:, None])[:, None, None]  # (B, 1, 1, Nk)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, dropout_p=dropout, scale=scale)
    return out[..., :value_dim].masked_fill(empty[:, None, None, None], 0.0)


@register("dense", unequal_lengths=True, value_dim=True)
class DenseAttention(nn.Module):
    """`dense_attention` as a mechanism: the exact softmax over all keys, without parameters.

    Args:
        scale: None means 1/sqrt(D).
        dropout: probability of dropping an attention weight while training.
    """

    def __init__(self, scale: float | None = None, dropout: float = 0.0) -> None:
        super().__init__()
        self.scale = scale
        self.dropout = dropout

    def check_lengths(self, num_queries: int, num_keys: int) -> None:
        """Any lengths will do."""
        check_lengths("dense", num_queries, num_keys)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        dropout = self.dropout if self.training else 0.0
        return dense_attention(q, k, v, self.scale, key_padding_mask, dropout)
