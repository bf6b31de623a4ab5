"""Linear attention: a product of feature maps in the place of the softmax, so that keys and values are summed once.

Katharopoulos et al. 2020, "Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention",
https://arxiv.org/abs/2006.16236. With a feature map φ (here elu + 1, Eq. 7) the output of query i is

    φ(q_i)ᵀ Σ_j φ(k_j) v_jᵀ / φ(q_i)ᵀ Σ_j φ(k_j)        (Eq. 5)

over all keys, or over those up to i with a causal mask (Eqs. 8 to 12), where the sums run along the sequence: from
block to block they are carried over, inside a block the small matrix of products is formed.

The Long Range Arena uses the same map.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.blocks import join_blocks, split_blocks
from attention.registry import AttentionFunction, check_inputs, register

CAUSAL_BLOCK = 64  # tokens between two sums of keys and values that are kept


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention with weights φ(q)·φ(k) / Σ φ(q)·φ(k), φ = elu + 1. Computes in float32 at least.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        key_padding_mask: bool (B, Nk), True = ignored.
        causal: query i sees the keys up to i; wants as many keys as queries.

    Returns:
        (B, H, Nq, Dv) in v's dtype. A query that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_inputs("linear", q, k, v, key_padding_mask)
    dtype = v.dtype
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        return feature_attention(_feature_map(q), _feature_map(k), v, key_padding_mask, causal).to(dtype)


def _feature_map(x: Tensor) -> Tensor:
    """elu(x) + 1; F.elu itself, compiled, returns another memory layout than it was traced with."""
    return torch.where(x > 0, x + 1, x.clamp_max(0).exp())


def feature_attention(
    q_features: Tensor, k_features: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """Attention whose weights are the products of features that are not negative, divided by their sums.

    Args:
        q_features: (B, H, Nq, M).  k_features: (B, H, Nk, M).  v: (B, H, Nk, Dv).

    Returns:
        (B, H, Nq, Dv). A query whose weights are all zero gets zeros.

    Raises:
        ValueError: `causal` with other numbers of keys than queries.
    """
    if key_padding_mask is not None:
        k_features = k_features.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    v = F.pad(v, (0, 1), value=1.0)  # the sum of the weights comes as one more value
    if causal:
        if q_features.shape[2] != k_features.shape[2]:
            lengths = f"{k_features.shape[2]} for {q_features.shape[2]}"
            raise ValueError(f"causal attention needs as many keys as queries, not {lengths}")
        out = _causal_sums(q_features, k_features, v)
    else:
        out = q_features @ (k_features.transpose(-1, -2) @ v)  # (B, H, Nq, Dv + 1)
    total = out[..., -1:]
    return out[..., :-1] / torch.where(total == 0, 1.0, total)


def _causal_sums(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Σ_{j <= i} (q_i·k_j) v_j: q, k (B, H, N, M), v (B, H, N, E) -> (B, H, N, E)."""
    num_tokens = q.shape[2]
    q, k, v = (split_blocks(x.transpose(1, 2), CAUSAL_BLOCK).transpose(2, 3) for x in (q, k, v))  # (B, n, H, m, ...)
    states = k.transpose(-1, -2) @ v  # (B, n, H, M, E), of each block
    before = states.cumsum(dim=1) - states  # of all blocks before it
    out = (q @ k.transpose(-1, -2)).tril() @ v + q @ before  # (B, n, H, m, E)
    return join_blocks(out.transpose(2, 3), num_tokens).transpose(1, 2)


@register("linear", unequal_lengths=True, value_dim=True, causal=True)
class LinearAttention(AttentionFunction):
    """`linear_attention` as a mechanism, without parameters.

    Args:
        causal: query i sees the keys up to i.
    """

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        return linear_attention(q, k, v, key_padding_mask, self.causal)
