"""Clustered attention in plain differentiable operations: any device, any dtype, dropout, and double backward.

One hash round at a time, so that only one round's scores are alive in a pass without gradients.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.smyrf.clusters import inverse_order


def einsum_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    num_clusters: int,
    scale: float,
    key_padding_mask: Tensor | None,
    dropout: float = 0.0,
) -> Tensor:
    """Shapes as in `clustered_attention`, with lengths that are multiples of `num_clusters`."""
    rounds = [
        _attend_in_clusters(q, k, v, q_round, k_round, num_clusters, scale, key_padding_mask, dropout)
        for q_round, k_round in zip(q_order, k_order, strict=True)
    ]
    out = torch.stack([out for out, _ in rounds])  # (R, B, H, Nq, Dv)
    lse = torch.stack([lse for _, lse in rounds])  # (R, B, H, Nq)
    weights = torch.softmax(lse, dim=0).to(out.dtype)
    return torch.einsum("rbhn,rbhnd->bhnd", weights, out)


def _attend_in_clusters(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    num_clusters: int,
    scale: float,
    key_padding_mask: Tensor | None,
    dropout: float,
) -> tuple[Tensor, Tensor]:
    """One round, q_order (B, H, Nq) and k_order (B, H, Nk): out (B, H, Nq, Dv) and lse (B, H, Nq)."""
    q = torch.take_along_dim(q, q_order[..., None], dim=2).unflatten(2, (num_clusters, -1))  # (B, H, L, Cq, D)
    k = torch.take_along_dim(k, k_order[..., None], dim=2).unflatten(2, (num_clusters, -1))  # (B, H, L, Ck, D)
    v = torch.take_along_dim(v, k_order[..., None], dim=2).unflatten(2, (num_clusters, -1))  # (B, H, L, Ck, Dv)
    scores = torch.einsum("bhlqd,bhlkd->bhlqk", q * scale, k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if key_padding_mask is not None:
        mask = key_padding_mask[:, None].expand_as(k_order).gather(-1, k_order).unflatten(2, (num_clusters, -1))
        # Finite, so that a cluster without keys has finite gradients; its lse leaves it no weight beside other rounds.
        scores = scores.masked_fill(mask[:, :, :, None], torch.finfo(scores.dtype).min / 2)
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout).to(v.dtype)
    out = torch.einsum("bhlqk,bhlkd->bhlqd", weights, v)
    if key_padding_mask is not None:
        out = out.masked_fill(mask.all(dim=-1)[..., None, None], 0.0)
    rank = inverse_order(q_order)
    lse = torch.logsumexp(scores, dim=-1).flatten(2).gather(-1, rank)
    return torch.take_along_dim(out.flatten(2, 3), rank[..., None], dim=2), lse
