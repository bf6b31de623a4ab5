"""What clustered attention is to compute: rounds of blocks of queries and keys, and which of their pairs count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MIN_RUN = 64  # tokens a run of the band: products of fewer would be slow


@dataclass(frozen=True)
class Layout:
    """Rounds of blocks of queries and keys; every query is in exactly one block of a round.

    Legend: R rounds, L blocks a sequence and round, M queries and N keys a block.

    `q_index` (R, B, H, L, M) and `k_index` (R, B, H, L, N), int64: which tokens of their sequence.
    `key_mask`: bool (B, Nk), True = ignored.
    `union`: a pair that meets in several rounds counts once, not once a round; every key is then in exactly one block
    of a round.
    `lag`, `reach`: a query at position i sees the keys at i - reach, ..., i - lag; None sets no limit.
    `max_score_bytes`: of scores at a time (the backward pass holds two such tensors); None = what suits the device.
    """

    q_index: Tensor
    k_index: Tensor
    key_mask: Tensor | None = None
    union: bool = False
    lag: int | None = None
    reach: int | None = None
    max_score_bytes: int | None = None

    @property
    def all_visible(self) -> bool:
        """Whether every pair of a block is."""
        return self.key_mask is None and self.lag is None and self.reach is None


def cluster_blocks(order: Tensor, num_clusters: int) -> Tensor:
    """(R, B, H, N) -> (R, B, H, L, N / L): the c-th run is cluster c."""
    return order.unflatten(-1, (num_clusters, -1))


def band_blocks(num_tokens: int, window: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Runs of consecutive queries, and for each the run of keys that holds every query's own and `window` before it.

    Returns:
        q_index (L, M) and k_index (L, N), int64. L·M may exceed num_tokens; indices go up to L·M.
    """
    run = min(max(window, MIN_RUN), num_tokens)
    first = torch.arange(0, num_tokens, run, device=like.device)[:, None]  # (L, 1)
    span = min(run + window, len(first) * run)
    q_index = first + torch.arange(run, device=like.device)
    k_index = (first - window).clamp_min(0) + torch.arange(span, device=like.device)
    return q_index, k_index
