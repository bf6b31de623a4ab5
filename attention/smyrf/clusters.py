"""Balanced clusters: transform, hash, sort, and cut the sorted queries and keys into equally many runs.

R counts hash rounds. An order is int64 (R, B, H, N): the index of the token of each rank; cluster c is its c-th run.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.smyrf.hashing import get_hash_family
from attention.smyrf.sorting import stable_order
from attention.smyrf.transforms import get_transform
from attention.smyrf.tree import masked_tree_order, tree_order


def resolve_cluster_sizes(
    num_queries: int, num_keys: int, q_cluster_size: int, k_cluster_size: int
) -> tuple[int, int, int]:
    """The cluster sizes, at most the lengths, and the number of clusters (the last ones may be partly filled).

    Raises:
        ValueError: a size below one, or a different number of clusters on the two sides; the message suggests sizes.
    """
    if q_cluster_size < 1 or k_cluster_size < 1:
        raise ValueError(f"cluster sizes must be positive, not {q_cluster_size} and {k_cluster_size}")
    q_cluster_size, k_cluster_size = min(q_cluster_size, num_queries), min(k_cluster_size, num_keys)
    q_clusters, k_clusters = _ceil_div(num_queries, q_cluster_size), _ceil_div(num_keys, k_cluster_size)
    if q_clusters != k_clusters:
        q_suggestion, k_suggestion = suggest_cluster_sizes(num_queries, num_keys, q_clusters)
        raise ValueError(
            f"{num_queries} queries in clusters of {q_cluster_size} make {q_clusters} clusters, but {num_keys} keys in "
            f"clusters of {k_cluster_size} make {k_clusters}; the numbers must be equal, as with "
            f"q_cluster_size={q_suggestion}, k_cluster_size={k_suggestion}"
        )
    return q_cluster_size, k_cluster_size, q_clusters


@torch.no_grad()
def cluster_orders(
    q: Tensor,
    k: Tensor,
    projections: Tensor,
    q_cluster_size: int,
    k_cluster_size: int,
    key_padding_mask: Tensor | None = None,
    query_padding_mask: Tensor | None = None,
    transform: str = "xbox+",
    hashing: str = "e2lsh",
) -> tuple[Tensor, Tensor]:
    """Orders of queries and keys for every hash round, in float32 at least.

    Masked tokens come after all others. Without a query mask, equal lengths mean self-attention: the key mask holds
    for both sides, and the real tokens of a padded row form the clusters that they would form alone. Otherwise the
    real tokens of either side are spread evenly over all clusters, so that no cluster of queries is left without keys
    (unless there are fewer keys than clusters).

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).
        projections: drawn by the hash family, for D + the coordinates of the transform; shared by rows and heads.
        key_padding_mask: bool (B, Nk).  query_padding_mask: bool (B, Nq).  True = ignored.

    Returns:
        q_order int64 (R, B, H, Nq) and k_order int64 (R, B, H, Nk).

    Raises:
        ValueError: unknown transform or hashing, or projections of another size.
    """
    self_attention = query_padding_mask is None and q.shape[2] == k.shape[2]
    if self_attention:
        query_padding_mask = key_padding_mask
    with torch.autocast(q.device.type, enabled=False):
        dtype = torch.promote_types(q.dtype, torch.float32)
        q, k, projections = q.to(dtype), k.to(dtype), projections.to(dtype)
        q_max, k_max = _largest_norm(q, query_padding_mask), _largest_norm(k, key_padding_mask)
        q, q_extra, k, k_extra = get_transform(transform).parts(q, k, q_max, k_max)
        q_order, k_order = (
            _order(x, extra, projections, hashing, mask, cluster_size, self_attention)
            for x, extra, mask, cluster_size in (
                (q, q_extra, query_padding_mask, q_cluster_size),
                (k, k_extra, key_padding_mask, k_cluster_size),
            )
        )
    if not self_attention:
        q_order = _spread(q_order, query_padding_mask, q_cluster_size)
        k_order = _spread(k_order, key_padding_mask, k_cluster_size)
    return q_order, k_order


def sort_tokens(sort_keys: Tensor, mask: Tensor | None) -> Tensor:
    """(B, H, N, R) -> order (R, B, H, N), masked tokens last."""
    if mask is not None:
        sort_keys = sort_keys.masked_fill(mask[:, None, :, None], torch.inf)
    return stable_order(sort_keys.movedim(-1, 0).contiguous())


def inverse_order(order: Tensor) -> Tensor:
    """The rank of every token: the inverse permutation along the last dimension."""
    ranks = torch.arange(order.shape[-1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def suggest_cluster_sizes(num_queries: int, num_keys: int, num_clusters: int) -> tuple[int, int]:
    """Sizes for the largest equal number of clusters up to `num_clusters`; one cluster always works."""
    for clusters in range(num_clusters, 0, -1):
        q_size, k_size = _ceil_div(num_queries, clusters), _ceil_div(num_keys, clusters)
        if _ceil_div(num_queries, q_size) == _ceil_div(num_keys, k_size):
            break
    return q_size, k_size


def _largest_norm(x: Tensor, mask: Tensor | None) -> Tensor:
    """Largest norm among the real tokens of each row: (B, H, N, D) -> (B, H, 1, 1)."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # (B, H, N, 1)
    if mask is not None:
        norms = norms.masked_fill(mask[:, None, :, None], 0.0)
    return norms.amax(dim=2, keepdim=True)


def _order(
    x: Tensor,
    extra: Tensor,
    projections: Tensor,
    hashing: str,
    mask: Tensor | None,
    cluster_size: int,
    self_attention: bool,
) -> Tensor:
    """Hashes x (B, H, N, D), with what the transform appended, and sorts: (R, B, H, N), masked tokens last."""
    family = get_hash_family(hashing)
    num_tokens, head_dim = x.shape[2:]
    num_clusters = _ceil_div(num_tokens, cluster_size)
    buckets = max(num_clusters, 2) if family.tree else projections.shape[-2]
    expected = family.shape(head_dim + extra.shape[-1], buckets, projections.shape[-1])
    if projections.shape != expected:
        raise ValueError(f"{hashing} needs projections {expected} for these inputs, not {tuple(projections.shape)}")
    if family.linear:
        sort_keys = family.sort_keys(x, projections[:head_dim])
        if extra.shape[-1]:
            sort_keys = sort_keys + family.sort_keys(extra, projections[head_dim:])
    else:
        sort_keys = family.sort_keys(torch.cat([x, extra], -1), projections)
    if not family.tree:
        return sort_tokens(sort_keys, mask)
    if mask is None:
        return tree_order(sort_keys, num_clusters, cluster_size)
    num_real = (~mask).sum(dim=1).clamp_min(1)  # (B,)
    rank = torch.arange(num_tokens, device=x.device)
    if self_attention:
        return masked_tree_order(sort_keys, mask, rank[None] // cluster_size, -(-num_real // cluster_size))
    shares = rank * num_clusters // num_real[:, None]  # `_spread` gives every cluster its share of the real tokens
    return masked_tree_order(sort_keys, mask, shares, torch.full_like(num_real, num_clusters))


def _spread(order: Tensor, mask: Tensor | None, cluster_size: int) -> Tensor:
    """Gives every cluster its share of the real tokens, and fills it up with masked ones.

    With n real tokens among N, the cluster of the slots [start, end) holds the ranks [n·start // N, n·end // N).
    """
    if mask is None:
        return order
    num_tokens = order.shape[-1]
    slot = torch.arange(num_tokens, device=order.device)
    start = slot - slot % cluster_size
    end = (start + cluster_size).clamp_max(num_tokens)
    real = (~mask).sum(dim=1)[:, None, None]  # (B, 1, 1)
    first, last = real * start // num_tokens, real * end // num_tokens  # (B, 1, N)
    offset = slot - start
    is_real = offset < last - first
    masked_before = start - first
    rank = torch.where(is_real, first + offset, real + masked_before + offset - (last - first))
    return order.gather(-1, rank.expand(order.shape))
