"""Naive twins for tests only: the definition, in float64, with no care for time or memory."""

from __future__ import annotations

import torch
from torch import Tensor


def multiset_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    scale: float,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax over the multiset union of the keys that a query meets, by a dense matrix of multiplicities.

    out_i = Σ_j m_ij exp(s_ij) v_j / Σ_j m_ij exp(s_ij), where m_ij counts the rounds in which i and j share a cluster.
    Any lengths and masks; a query that meets no key gets zeros. Shapes as in `attention.clustered_attention`.
    """
    q, k, v = q.double(), k.double(), v.double()
    multiplicity = co_clustered(q_order, k_order, q_cluster_size, k_cluster_size).sum(dim=0).double()  # (B, H, Nq, Nk)
    if key_padding_mask is not None:
        multiplicity = multiplicity * ~key_padding_mask[:, None, None]
    scores = scale * q @ k.transpose(-1, -2)
    scores = scores.masked_fill(multiplicity == 0, -torch.inf)
    top = scores.detach().amax(-1, keepdim=True).clamp_min(-1e300)
    mass = multiplicity * (scores - top).exp()
    return (mass @ v) / mass.sum(-1, keepdim=True).clamp_min(1e-300)


def co_clustered(q_order: Tensor, k_order: Tensor, q_cluster_size: int, k_cluster_size: int) -> Tensor:
    """bool (R, B, H, Nq, Nk): whether query i and key j share a cluster in round r."""
    q_cluster = torch.argsort(q_order, dim=-1) // q_cluster_size
    k_cluster = torch.argsort(k_order, dim=-1) // k_cluster_size
    return q_cluster[..., :, None] == k_cluster[..., None, :]
