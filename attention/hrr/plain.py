"""HRR attention as one expression of matrix products: what autograd, XLA and every device of torch can take.

The superposition β = Σ_t k_t ⊛ v_t is the key-value state S = KᵀV summed along its circular anti-diagonals, and
unbinding the queries from it is one product with the Hankel-circulant matrix of β. No Fourier transform, any head size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.hrr.cosine import cosine
from attention.hrr.ops import hankel, sum_of_bindings


def plain_hrr_attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, mask_superposition: bool
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, D) in q's dtype and weights (B, H, N), float32 at least; arguments as in `hrr_attention`."""
    dtype = q.dtype
    mask = None if key_padding_mask is None else key_padding_mask[:, None]  # (B, 1, N)
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        if mask is not None and mask_superposition:
            k = k.masked_fill(mask[..., None], 0.0)
        state = k.transpose(-1, -2) @ v  # (B, H, D, D)
        retrieved = q @ hankel(sum_of_bindings(state))  # (B, H, N, D)
        scores = cosine(v, retrieved)  # (B, H, N)
        if mask is not None:
            scores = scores - 1e30 * mask  # drowns the cosines in every dtype, so that they count alike
        weights = torch.softmax(scores, dim=-1)
        if mask is not None and mask_superposition:
            weights = weights.masked_fill(mask, 0.0)
        return (weights[..., None] * v).to(dtype), weights
