"""HRR attention in its fast form (Alam et al. 2023, arXiv:2305.19534): linear in the tokens, matrix products only.

The superposition β = Σ_t k_t ⊛ v_t is the key-value state S = KᵀV summed along its circular anti-diagonals, and
unbinding the queries from it is one product with the Hankel-circulant matrix of β. No Fourier transform, any head size.

What it computes mixes no values between tokens: other tokens act on token t only through its scalar weight, which lies
in [e⁻²/N, e²/N].
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.hrr.ops import hankel, sum_of_bindings
from attention.multi_head import MultiHeadAttention
from attention.registry import check_inputs, check_lengths, register


def hrr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    return_weights: bool = False,
    mask_superposition: bool = True,
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = w_t v_t with w = softmax over tokens of cosine(v_t, unbind(β, q_t)), β = Σ_t bind(k_t, v_t).

    Computes in float32 at least. The cosine of a zero vector counts as 0.

    Args:
        q, k, v: (B, H, N, D).
        key_padding_mask: bool (B, N), True = ignored: no weight, zero output.
        return_weights: also return w (B, H, N).
        mask_superposition: keep masked tokens out of β, so that padding changes nothing. False is the original's
            treatment: they enter β, and a row whose tokens are all masked gets the weights 1/N instead of zeros
            (in float32, where -1e9 drowns the cosines).

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: q, k and v are not of one shape.

    Source: Alam et al. 2023, arXiv:2305.19534, Eqs. 1-4.
    """
    check_inputs("hrr", q, k, v, key_padding_mask)
    dtype = q.dtype
    mask = None if key_padding_mask is None else key_padding_mask[:, None]  # (B, 1, N)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        if mask is not None and mask_superposition:
            k = k.masked_fill(mask[..., None], 0.0)
        state = k.transpose(-1, -2) @ v  # (B, H, D, D)
        retrieved = q @ hankel(sum_of_bindings(state))  # (B, H, N, D)
        # One quotient after the other: the product of two small norms could vanish.
        cosine = (v * retrieved).sum(-1) / _safe_norm(v) / _safe_norm(retrieved)  # (B, H, N)
        if mask is not None:
            cosine = cosine - 1e9 * mask
        weights = torch.softmax(cosine, dim=-1)
        if mask is not None and mask_superposition:
            weights = weights.masked_fill(mask, 0.0)
        out = (weights[..., None] * v).to(dtype)
    return (out, weights) if return_weights else out


def _safe_norm(x: Tensor) -> Tensor:
    """Euclidean norm over the last dimension, never zero, with a finite gradient everywhere."""
    return torch.linalg.vector_norm(x, dim=-1).clamp_min(1e-18)


@register("hrr", unequal_lengths=False, value_dim=False)
class HRRAttention(nn.Module):
    """`hrr_attention` as a mechanism, without parameters.

    Args:
        mask_superposition: as in `hrr_attention`.
    """

    def __init__(self, mask_superposition: bool = True) -> None:
        super().__init__()
        self.mask_superposition = mask_superposition

    def check_lengths(self, num_queries: int, num_keys: int) -> None:
        """ValueError unless there are as many keys as queries."""
        check_lengths("hrr", num_queries, num_keys)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k, v (B, H, N, D), key_padding_mask bool (B, N), True = ignored -> (B, H, N, D)."""
        return hrr_attention(q, k, v, key_padding_mask, mask_superposition=self.mask_superposition)


class HRRSelfAttention(MultiHeadAttention):
    """The self-attention layer of Hrrformer, (B, N, C) -> (B, N, C); its parameters are those of `MultiHeadAttention`.

    Args:
        dim: channels C, a multiple of `num_heads`.
        bias: whether the four projections have one.
        mask_superposition: as in `hrr_attention`.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = False, mask_superposition: bool = True) -> None:
        super().__init__(dim, num_heads, "hrr", bias, mask_superposition=mask_superposition)
