"""The backward pass of block attention in tiles of matrix products, each head at its own size.

The CPU's fused backward wants one head size: where queries and keys are much shorter than values, as in image models,
three of its five products run on padding. Tiles that stay in cache need no padding and beat it.

Legend: S blocks, each an independent attention of M queries to N keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

TILE_SCORES = 1 << 19  # scores alive at a time in each thread: 2 MB in float32, near enough to the core


def prefers_tiles(q: Tensor, v: Tensor) -> bool:
    """Whether tiles beat the fused backward here: a CPU, full precision, and padding that doubles a head size."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and 2 * q.shape[-1] <= v.shape[-1]


def tiled_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, delta: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """What `fused_attention_backward` computes, given delta = rowsum(grad_out * out) in the place of out.

    Args:
        q: (S, M, D).  k: (S, N, D).  v: (S, N, Dv).  grad_out: (S, M, Dv).  delta, lse: (S, M).
        key_mask: bool (S, N), True = ignored.
    """
    num_blocks, num_queries = q.shape[:2]
    num_keys = k.shape[1]
    tile_queries = min(num_queries, max(TILE_SCORES // num_keys, 1))
    tile_blocks = max(TILE_SCORES // (num_keys * tile_queries), 1) * torch.get_num_threads()  # one share each
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(s - inf) = 0: these queries saw no key
    grad_q = torch.empty_like(q)
    grad_k, grad_v = (x.new_zeros(num_blocks, x.shape[2], num_keys) for x in (k, v))  # transposed: faster products
    for first in range(0, num_blocks, tile_blocks):
        s = slice(first, first + tile_blocks)
        k_transposed, v_transposed = k[s].transpose(1, 2), v[s].transpose(1, 2)
        for m in (slice(start, start + tile_queries) for start in range(0, num_queries, tile_queries)):
            q_tile, grad_tile = q[s, m] * scale, grad_out[s, m]
            weights = torch.bmm(q_tile, k_transposed).sub_(lse[s, m, None]).exp_()
            if key_mask is not None:
                weights.masked_fill_(key_mask[s, None], 0.0)
            grad_scores = torch.bmm(grad_tile, v_transposed).sub_(delta[s, m, None]).mul_(weights)
            grad_v[s].baddbmm_(grad_tile.transpose(1, 2), weights)
            grad_k[s].baddbmm_(q_tile.transpose(1, 2), grad_scores)
            grad_q[s, m] = torch.bmm(grad_scores, k[s]).mul_(scale)
    return grad_q, grad_k.transpose(1, 2), grad_v.transpose(1, 2)
