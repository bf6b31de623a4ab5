"""SMYRF attention as functions: attention inside given clusters, and with the clustering in front of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.fused import supports_fused
from attention.registry import check_inputs, check_padding_mask
from attention.smyrf.clusters import cluster_orders, resolve_cluster_sizes
from attention.smyrf.einsum import einsum_clustered_attention
from attention.smyrf.flash import flash_clustered_attention

BACKENDS = ("auto", "einsum", "flash")


def smyrf_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projections: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    transform: str = "xbox+",
    hashing: str = "e2lsh",
    backend: str = "auto",
    return_clusters: bool = False,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention inside balanced clusters of hashed queries and keys, merged over hash rounds.

    Equals a softmax over the multiset union of the keys that a query meets: a key met in two rounds counts twice.
    A function of its arguments alone (without dropout); no gradient flows through the clustering.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        projections: random directions of the hash family. "e2lsh": Gaussian (D + extra, num_hashes), where extra is
            what the transform appends to the head size: 2 for "xbox+", 1 for "xbox" and "h2lsh", 3 for "l2lsh".
            "voronoi": Gaussian (D + extra, K, num_hashes).  "cross-polytope": signs (3, P, num_hashes).
        q_cluster_size, k_cluster_size: tokens a cluster. A size above the length counts as the length; lengths need
            not be multiples of the sizes.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk).  query_padding_mask: bool (B, Nq).  True = ignored. Without a query mask,
            equal lengths mean self-attention, and the key mask orders both sides (see `cluster_orders`).
        dropout: probability of dropping an attention weight.
        transform: "xbox+", "xbox", "h2lsh" or "l2lsh".  hashing: "e2lsh", "voronoi" or "cross-polytope".
        backend: as in `clustered_attention`.
        return_clusters: also return (q_order, k_order), int64 (num_hashes, B, H, N): the index of the token of every
            rank; cluster c is the c-th run.

    Returns:
        (B, H, Nq, Dv). A query whose keys are all masked gets zeros.

    Raises:
        ValueError: shapes that do not fit, unequal numbers of clusters, an unknown transform, hashing or back-end.

    Source: Daras et al. 2020, arXiv:2010.05315, section 3.
    """
    check_inputs("smyrf", q, k, v, key_padding_mask)
    if query_padding_mask is not None:
        check_padding_mask("query_padding_mask", query_padding_mask, q)
    q_cluster_size, k_cluster_size, _ = resolve_cluster_sizes(q.shape[2], k.shape[2], q_cluster_size, k_cluster_size)
    q_order, k_order = cluster_orders(
        q,
        k,
        projections,
        q_cluster_size,
        k_cluster_size,
        key_padding_mask,
        query_padding_mask,
        transform,
        hashing,
    )
    out = clustered_attention(
        q, k, v, q_order, k_order, q_cluster_size, k_cluster_size, scale, key_padding_mask, dropout, backend
    )
    return (out, (q_order, k_order)) if return_clusters else out


def clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    dropout: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention inside given clusters, merged over hash rounds.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        q_order: int64 (R, B, H, Nq), a permutation of the queries per hash round.  k_order: int64 (R, B, H, Nk).
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.
        dropout: probability of dropping an attention weight; "einsum" only.
        backend: "einsum" (any device), "flash" (fused kernels; CPU and CUDA; no second derivatives), or "auto": flash
            where the device and dtype have it and dropout is off, else einsum.

    Returns:
        (B, H, Nq, Dv). A query whose keys are all masked gets zeros.

    Raises:
        ValueError: the two sides have a different number of clusters, or the back-end cannot do this.

    Source: Daras et al. 2020, arXiv:2010.05315, section 3.
    """
    backend = _choose_backend(backend, q, dropout)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_queries, num_keys = q.shape[2], k.shape[2]
    q_cluster_size, k_cluster_size, num_clusters = resolve_cluster_sizes(
        num_queries, num_keys, q_cluster_size, k_cluster_size
    )
    # Whole clusters: padding holds the last ranks in every round, its keys are masked and its queries cut off.
    q_padding = num_clusters * q_cluster_size - num_queries
    k_padding = num_clusters * k_cluster_size - num_keys
    if q_padding:
        q, q_order = F.pad(q, (0, 0, 0, q_padding)), _pad_order(q_order, q_padding)
    if k_padding:
        k, v, k_order = F.pad(k, (0, 0, 0, k_padding)), F.pad(v, (0, 0, 0, k_padding)), _pad_order(k_order, k_padding)
        if key_padding_mask is None:
            key_padding_mask = torch.zeros(k.shape[0], num_keys, dtype=torch.bool, device=k.device)
        key_padding_mask = F.pad(key_padding_mask, (0, k_padding), value=True)
    if backend == "flash":
        out = flash_clustered_attention(q, k, v, q_order, k_order, num_clusters, scale, key_padding_mask)
    else:
        out = einsum_clustered_attention(q, k, v, q_order, k_order, num_clusters, scale, key_padding_mask, dropout)
    return out[:, :, :num_queries]


def check_backend(backend: str, dropout: float) -> None:
    """ValueError where there is no such back-end, or it has no dropout."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")
    if backend == "flash" and dropout > 0:
        raise ValueError("the flash backend has no dropout; use backend 'einsum' (or 'auto'), or dropout 0")


def _choose_backend(backend: str, q: Tensor, dropout: float) -> str:
    check_backend(backend, dropout)
    fused = supports_fused(q.device, q.dtype)
    if backend == "flash" and not fused:
        raise ValueError(f"the flash backend has no kernel for {q.dtype} on {q.device.type}; use backend 'einsum'")
    if backend == "auto":
        return "flash" if fused and dropout == 0 else "einsum"
    return backend


def _pad_order(order: Tensor, padding: int) -> Tensor:
    """Appends the padding's tokens to every round's order, as its last ranks."""
    num_tokens = order.shape[-1]
    tail = torch.arange(num_tokens, num_tokens + padding, device=order.device)
    return torch.cat([order, tail.expand(*order.shape[:-1], -1)], dim=-1)
