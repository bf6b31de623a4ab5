"""SMYRF attention as functions: attention inside given clusters, and with the clustering in front of it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.merging import merge as merge_parts
from attention.native_support import native_obstacle
from attention.registry import check_inputs, check_padding_mask
from attention.smyrf.clusters import cluster_orders, resolve_cluster_sizes
from attention.smyrf.einsum import einsum_attend
from attention.smyrf.flash import flash_attend
from attention.smyrf.layout import Layout, band_blocks, cluster_blocks
from attention.tiled import HIDDEN

BACKENDS = ("auto", "einsum", "flash", "native", "triton")
MERGES = ("multiset", "union")


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
    merge: str = "multiset",
    causal_mask: bool = False,
    window: int = 0,
    max_score_bytes: int | None = None,
) -> Tensor | tuple[Tensor, tuple[Tensor, Tensor]]:
    """Attention inside balanced clusters of hashed queries and keys, merged over hash rounds.

    A softmax over the keys that a query meets; `merge` says how often a key counts that it meets in several rounds.
    A function of its arguments alone (without dropout); no gradient flows through the clustering.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        projections: random directions of the hash family. "e2lsh", "orthogonal": (D + extra, num_hashes), where extra
            is what the transform appends to the head size: 2 for "xbox+", 1 for "xbox" and "h2lsh", 3 for "l2lsh", 0
            for "none".  "rp-tree": (D + extra, T, num_hashes) for at most 2^T clusters.  "voronoi": Gaussian
            (D + extra, K, num_hashes).  "cross-polytope": signs (3, P, num_hashes).
        q_cluster_size, k_cluster_size: tokens a cluster. A size above the length counts as the length; lengths need
            not be multiples of the sizes.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk).  query_padding_mask: bool (B, Nq).  True = ignored. Without a query mask,
            equal lengths mean self-attention, and the key mask orders both sides (see `cluster_orders`).
        dropout: probability of dropping an attention weight.
        transform: "xbox+", "xbox", "h2lsh", "l2lsh" or "none".
        hashing: "e2lsh", "orthogonal", "rp-tree", "voronoi" or "cross-polytope".
        backend, merge, causal_mask, window, max_score_bytes: as in `clustered_attention`. Clusters are balanced over
            all tokens: behind a causal mask no token attends to a later one, but later ones take part in the choice
            of those that it meets.
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
        q,
        k,
        v,
        q_order,
        k_order,
        q_cluster_size,
        k_cluster_size,
        scale,
        key_padding_mask,
        dropout,
        backend,
        merge,
        causal_mask,
        window,
        max_score_bytes,
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
    merge: str = "multiset",
    causal_mask: bool = False,
    window: int = 0,
    max_score_bytes: int | None = None,
) -> Tensor:
    """Softmax attention inside given clusters, merged over hash rounds.

    out_i = Σ_j m_ij exp(s_ij) v_j / Σ_j m_ij exp(s_ij). In a "multiset" merge, the paper's, m_ij counts the rounds in
    which i and j share a cluster. In a "union" it is 1 if there is one: nearer to dense attention for the same keys.
    With a causal mask, pairs of clusters count where j <= i, and the band i - window <= j <= i is one more round: there
    m_ij is one more in a multiset, and 1 in a union. So every token attends to itself.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        q_order: int64 (R, B, H, Nq), a permutation of the queries per hash round.  k_order: int64 (R, B, H, Nk).
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.
        dropout: probability of dropping an attention weight; "einsum" only.
        backend: "einsum" (any device; batched products, second derivatives), "flash" (any device; tiles and fused
            kernels; what it keeps for the backward pass does not grow with the rounds), "native" (CPU, not float64; as
            flash, by kernels that the machine's C compiler builds once), "triton" (CUDA), or "auto": einsum with
            dropout and on XLA; else triton or native where it can run, else flash.
        merge: "multiset" or "union".
        causal_mask: for self-attention.  window: earlier tokens next to its own that a token always attends to.
        max_score_bytes: bounds the scores that are in memory at a time (twice that in the backward pass), down to one
            query of one cluster (einsum: of one cluster in every row and head). None: what suits the device. With
            dropout, only the forward pass is bounded. Triton and native keep no scores.

    Returns:
        (B, H, Nq, Dv). A query that sees no key gets zeros.

    Raises:
        ValueError: the two sides have a different number of clusters, an unknown choice, a window without a causal
            mask, or the back-end cannot do this.

    Source: Daras et al. 2020, arXiv:2010.05315, section 3.
    """
    check_options(backend, dropout, merge, causal_mask, window, max_score_bytes)
    num_queries, num_keys = q.shape[2], k.shape[2]
    if causal_mask and num_queries != num_keys:
        raise ValueError(f"a causal mask needs as many keys as queries, not {num_keys} for {num_queries}")
    backend = _choose_backend(q, v, dropout) if backend == "auto" else backend
    if backend == "native" and (obstacle := native_obstacle("smyrf", q, v)):
        raise ValueError(f"the native backend {obstacle}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q_cluster_size, k_cluster_size, num_clusters = resolve_cluster_sizes(
        num_queries, num_keys, q_cluster_size, k_cluster_size
    )
    # Whole clusters: padding holds the last ranks in every round.
    q_padding = num_clusters * q_cluster_size - num_queries
    k_padding = num_clusters * k_cluster_size - num_keys
    q_order, k_order = _pad_order(q_order, q_padding), _pad_order(k_order, k_padding)
    padded = _pad_tokens(q, k, v, key_padding_mask, q_padding, k_padding)
    union = merge == "union"
    lag = None if not causal_mask else window + 1 if union else 0  # a union leaves the band's pairs to the band
    if backend == "triton":
        from attention.smyrf.triton_backend import triton_clustered_attention

        out, lse = triton_clustered_attention(
            *padded[:3], q_order, k_order, num_clusters, scale, padded[3], merge=merge, lag=lag
        )
    else:
        q_index, k_index = cluster_blocks(q_order, num_clusters), cluster_blocks(k_order, num_clusters)
        layout = Layout(q_index, k_index, padded[3], union, lag, None, max_score_bytes)
        out, lse = _attend(*padded[:3], layout, scale, backend, dropout)
    out, lse = out[:, :, :num_queries], lse[:, :, :num_queries]
    if not causal_mask:
        return out
    q_index, k_index = band_blocks(num_queries, min(window, num_queries - 1), q)
    padding = q_index.numel() - num_queries
    padded = _pad_tokens(q, k, v, key_padding_mask, padding, padding)
    q_index, k_index = (index.expand(1, *q.shape[:2], -1, -1) for index in (q_index, k_index))
    layout = Layout(q_index, k_index, padded[3], False, 0, window, max_score_bytes)
    band_out, band_lse = _attend(*padded[:3], layout, scale, backend, dropout)
    parts = (out, lse), (band_out[:, :, :num_queries], band_lse[:, :, :num_queries])
    return merge_parts(*((out, lse.clamp_min(HIDDEN)) for out, lse in parts))[0]


def check_options(
    backend: str, dropout: float, merge: str, causal_mask: bool, window: int, max_score_bytes: int | None
) -> None:
    """ValueError for an unknown choice, or choices that exclude each other."""
    for name, value, choices in (("backend", backend, BACKENDS), ("merge", merge, MERGES)):
        if value not in choices:
            raise ValueError(f"unknown {name} {value!r}; available: {', '.join(choices)}")
    if dropout > 0 and backend not in ("auto", "einsum"):
        raise ValueError(f"the {backend} backend has no dropout; use backend 'einsum' (or 'auto'), or dropout 0")
    if window < 0 or (window and not causal_mask):
        raise ValueError(
            f"a window counts the earlier tokens that a causal mask always shows, not {window} with {causal_mask=}"
        )
    if max_score_bytes is not None and max_score_bytes < 1:
        raise ValueError(f"max_score_bytes must be positive, not {max_score_bytes}")


def _choose_backend(q: Tensor, v: Tensor, dropout: float) -> str:
    if dropout > 0 or q.device.type == "xla":
        return "einsum"
    if q.device.type == "cuda":
        from attention.smyrf.triton_backend import supports_triton

        return "triton" if supports_triton(q, v) else "flash"
    return "flash" if native_obstacle("smyrf", q, v) else "native"


def _attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, backend: str, dropout: float
) -> tuple[Tensor, Tensor]:
    """Triton's kernels gather permutations alone; what is no permutation goes to flash there."""
    if backend == "einsum":
        return einsum_attend(q, k, v, layout, scale, dropout)
    return flash_attend(q, k, v, layout, scale, use_native=backend == "native")


def _pad_tokens(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, q_padding: int, k_padding: int
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Appends tokens to both sides, and to the mask as ignored ones."""
    q, k, v = (
        F.pad(x, (0, 0, 0, padding)) if padding else x
        for x, padding in ((q, q_padding), (k, k_padding), (v, k_padding))
    )
    if k_padding and key_padding_mask is None:
        key_padding_mask = torch.zeros(k.shape[0], k.shape[2] - k_padding, dtype=torch.bool, device=k.device)
    return q, k, v, F.pad(key_padding_mask, (0, k_padding), value=True) if k_padding else key_padding_mask


def _pad_order(order: Tensor, padding: int) -> Tensor:
    """Appends the padding's tokens to every round's order, as its last ranks."""
    num_tokens = order.shape[-1]
    tail = torch.arange(num_tokens, num_tokens + padding, device=order.device)
    return torch.cat([order, tail.expand(*order.shape[:-1], -1)], dim=-1) if padding else order
