"""Orders by a tree of nested halves: sort by one direction, cut at the median, sort each half by the next, and so on.

Ranks, not values, are cut, so that all clusters hold equally many tokens, and queries and keys are paired by their
place in the tree. Legend: T levels, R hash rounds; L clusters a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.smyrf.sorting import stable_order


def tree_order(sort_keys: Tensor, num_clusters: int, cluster_size: int) -> Tensor:
    """(B, H, N, T, R) -> order (R, B, H, N), for tokens that are all real.

    Where halves are equal, the smaller numbers are selected and not sorted.
    """
    num_tokens, num_levels = sort_keys.shape[2:4]
    if num_clusters & (num_clusters - 1) or num_tokens != num_clusters * cluster_size:
        rank = torch.arange(num_tokens, device=sort_keys.device)
        return masked_tree_order(sort_keys, None, rank[None] // cluster_size, torch.full_like(rank[:1], num_clusters))
    sort_keys = sort_keys.permute(3, 4, 0, 1, 2)  # (T, R, B, H, N)
    order = torch.arange(num_tokens, device=sort_keys.device).expand(sort_keys.shape[1:])
    for level in range(min(num_levels, num_clusters.bit_length() - 1)):
        keys = sort_keys[level].gather(-1, order).unflatten(-1, (1 << level, -1))  # (R, B, H, cells, tokens)
        half = keys.shape[-1] // 2
        lower = torch.zeros_like(keys, dtype=torch.bool)
        lower.scatter_(-1, keys.topk(half, largest=False, sorted=False).indices, True)
        place = torch.where(lower, lower.cumsum(-1), half + (~lower).cumsum(-1)) - 1
        order = torch.empty_like(place).scatter_(-1, place, order.view_as(place)).flatten(-2)
    return order


def masked_tree_order(sort_keys: Tensor, mask: Tensor | None, cluster_of_rank: Tensor, num_clusters: Tensor) -> Tensor:
    """(B, H, N, T, R) -> order (R, B, H, N), masked tokens last, for any numbers of clusters and tokens.

    One sort a level, by the half that a rank belongs to plus a fraction that falls and rises with the direction.

    Args:
        mask: bool (B, N), True = ignored.
        cluster_of_rank: int64 (B or 1, N), not falling.  num_clusters: int64 (B or 1,), of its real tokens.
    """
    sort_keys = sort_keys.permute(3, 4, 0, 1, 2)  # (T, R, B, H, N)
    size = sort_keys.abs()
    if mask is not None:
        size = size.masked_fill(mask[:, None], 0.0)
    largest = size.amax(dim=-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    fraction = 0.5 + 0.4 * sort_keys / largest  # in [0.1, 0.9]
    if mask is not None:
        fraction = fraction.masked_fill(mask[:, None], torch.inf)
    order = torch.arange(sort_keys.shape[-1], device=sort_keys.device).expand(sort_keys.shape[1:])
    for level, fractions in enumerate(fraction):
        half = (cluster_of_rank << level) // num_clusters[:, None]  # halves of level l hold whole halves of l + 1
        order = order.gather(-1, stable_order(half[:, None] + fractions.gather(-1, order)))
    return order
