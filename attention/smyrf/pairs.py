"""Which pairs of a query and a key count, tile by tile: visibility by mask and position, and each pair once in a union.

A pair that meets in several rounds counts, in a union, in the first of them alone: in a later round it is left out
where the two tokens shared a cluster before. That takes one comparison of cluster numbers for each earlier round, in
16-bit integers, which costs a few hundredths of the matrix products.

Legend: R rounds of S blocks, S_t of them in a tile; M queries and N keys a block; P earlier rounds.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attention.smyrf.layout import Layout
from attention.tiled import HIDDEN, Scratch


class Keys(NamedTuple):
    """What is needed to know of the keys of a tile; None where no rule asks for it."""

    bias: Tensor | None  # (S_t, 1, N)
    position: Tensor | None  # (S_t, 1, N)
    clusters: Tensor | None  # (P, S_t, 1, N)


class Pairs:
    """The rules of a layout, for tiles of its blocks.

    Args:
        q_rows: (R·S, M), rows among the queries of all sequences.  k_rows: (R·S, N).
        lengths: tokens of a sequence of queries and of one of keys, so that a row's remainder is its position.
    """

    def __init__(
        self, layout: Layout, q_rows: Tensor, k_rows: Tensor, lengths: tuple[int, int], scratch: Scratch
    ) -> None:
        num_rounds = len(layout.q_index)
        self.layout = layout
        self.scratch = scratch
        self.q_length, self.k_length = lengths
        self.num_blocks = len(q_rows) // num_rounds  # S
        self.key_bias = self.q_clusters = self.k_clusters = None
        if layout.key_mask is not None:
            num_heads = layout.k_index.shape[2]
            self.key_bias = HIDDEN * layout.key_mask.repeat_interleave(num_heads, 0).flatten().to(scratch.dtype)
        if layout.union and num_rounds > 1:
            self.q_clusters, self.k_clusters = (_clusters_of_rows(rows, num_rounds) for rows in (q_rows, k_rows))

    def of_keys(self, k_rows: Tensor, blocks: slice) -> Keys:
        """For the keys (S_t, N) of the blocks, counted through all rounds."""
        bias = position = clusters = None
        if self.key_bias is not None:
            bias = self.scratch.gather("key_bias", self.key_bias, k_rows).unsqueeze(1)
        if self.layout.lag is not None or self.layout.reach is not None:
            position = (k_rows % self.k_length).to(self.scratch.dtype).unsqueeze(1)
        if self.k_clusters is not None:
            clusters = self._earlier(self.k_clusters, k_rows, blocks).unsqueeze(2)
        return Keys(bias, position, clusters)

    def hide_(self, scores: Tensor, q_rows: Tensor, keys: Keys) -> Tensor:
        """Adds HIDDEN or less to the scores (S_t, M, N) of pairs that are not visible."""
        if keys.bias is not None:
            scores.add_(keys.bias)
        if keys.position is not None:
            position = (q_rows % self.q_length).to(self.scratch.dtype).unsqueeze(-1)  # (S_t, M, 1)
            for limit, sign in ((self.layout.lag, 1), (self.layout.reach, -1)):
                if limit is not None:  # sign * (i - j - limit) >= 0, or else at most -1
                    out = self.scratch("distance", *scores.shape)
                    distance = torch.sub(sign * (position - limit), sign * keys.position, out=out)
                    scores.add_(distance.clamp_(max=0.0), alpha=-HIDDEN)
        return scores

    def keep(self, q_rows: Tensor, keys: Keys, blocks: slice) -> Tensor | None:
        """(S_t, M, N): 0 where the pair shared a cluster in an earlier round, else 1; None where there is none."""
        if keys.clusters is None or not len(keys.clusters):
            return None
        clusters = self._earlier(self.q_clusters, q_rows, blocks).unsqueeze(-1)  # (P, S_t, M, 1)
        first_round = blocks.start // self.num_blocks
        if first_round < len(clusters):  # blocks of several rounds: to each, only its own earlier rounds matter
            own_round = torch.arange(blocks.start, blocks.stop, device=q_rows.device) // self.num_blocks
            rounds = torch.arange(len(clusters), device=q_rows.device)
            too_late = (rounds[:, None] >= own_round).view(*clusters.shape[:2], 1, 1)
            clusters = clusters.masked_fill(too_late, torch.iinfo(clusters.dtype).max)  # a number that no key has
        shape = (*q_rows.shape, keys.clusters.shape[-1])
        unequal = None
        for q_round, k_round in zip(clusters, keys.clusters, strict=True):
            name = "unequal" if unequal is None else "unequal_too"
            differs = torch.bitwise_xor(q_round, k_round, out=self.scratch(name, *shape, dtype=q_round.dtype))
            unequal = differs if unequal is None else torch.minimum(unequal, differs, out=unequal)
        return self.scratch("keep", *shape).copy_(unequal.clamp_(max=1))

    def _earlier(self, clusters: Tensor, rows: Tensor, blocks: slice) -> Tensor:
        """Cluster numbers of these rows in all rounds before the last that the blocks belong to: (P, S_t, M)."""
        last_round = (blocks.stop - 1) // self.num_blocks
        return clusters[:last_round].index_select(1, rows.flatten()).view(last_round, *rows.shape)


def _clusters_of_rows(rows: Tensor, num_rounds: int) -> Tensor:
    """(R·S, M), every row once a round -> (R, S·M): the block that holds the row, in the smallest integers."""
    num_blocks = len(rows) // num_rounds
    dtype = torch.int16 if num_blocks < torch.iinfo(torch.int16).max else torch.int32
    numbers = torch.arange(num_blocks, dtype=dtype, device=rows.device).repeat_interleave(rows.shape[1])
    rows = rows.view(num_rounds, -1)
    return torch.empty_like(rows, dtype=dtype).scatter_(1, rows, numbers.expand_as(rows))
