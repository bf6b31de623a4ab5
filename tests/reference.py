"""Naive twins for tests only: the definition, in float64, with no care for time or memory."""

from __future__ import annotations

import torch
from torch import Tensor


def clustered_oracle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    scale: float,
    key_padding_mask: Tensor | None = None,
    merge: str = "multiset",
    causal_mask: bool = False,
    window: int = 0,
) -> Tensor:
    """Softmax over the keys that a query meets, by a dense matrix of multiplicities.

    out_i = Σ_j m_ij exp(s_ij) v_j / Σ_j m_ij exp(s_ij), where m_ij counts the rounds in which i and j share a cluster,
    and the band i - window <= j <= i as one more round if there is a causal mask; at most 1 in a union.
    Any lengths and masks; a query that meets no key gets zeros. Shapes as in `attention.clustered_attention`.
    """
    q, k, v = q.double(), k.double(), v.double()
    meetings = co_clustered(q_order, k_order, q_cluster_size, k_cluster_size).sum(dim=0).double()  # (B, H, Nq, Nk)
    if causal_mask:
        behind = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])  # i - j
        meetings = meetings * (behind >= 0) + ((behind >= 0) & (behind <= window))
    if merge == "union":
        meetings = meetings.clamp_max(1.0)
    if key_padding_mask is not None:
        meetings = meetings * ~key_padding_mask[:, None, None]
    scores = scale * q @ k.transpose(-1, -2)
    scores = scores.masked_fill(meetings == 0, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    mass = meetings * (scores - top).exp()
    return (mass @ v) / mass.sum(-1, keepdim=True).clamp_min(1e-300)


def co_clustered(q_order: Tensor, k_order: Tensor, q_cluster_size: int, k_cluster_size: int) -> Tensor:
    """bool (R, B, H, Nq, Nk): whether query i and key j share a cluster in round r."""
    q_cluster = torch.argsort(q_order, dim=-1) // q_cluster_size
    k_cluster = torch.argsort(k_order, dim=-1) // k_cluster_size
    return q_cluster[..., :, None] == k_cluster[..., None, :]


def visible_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float | None = None) -> Tensor:
    """softmax(scale * q kᵀ) v over the visible keys: an N x N matrix for every head; a query without keys gets zeros.

    q, k (B, H, N, D), v (B, H, N, Dv), visible bool, broadcast to (B, H, N, N); scale None means 1/sqrt(D).
    """
    scores = (q.shape[-1] ** -0.5 if scale is None else scale) * q @ k.transpose(-1, -2)
    mass = torch.where(visible, scores, -torch.inf).clamp_min(-1e300).softmax(-1) * visible
    return mass @ v
