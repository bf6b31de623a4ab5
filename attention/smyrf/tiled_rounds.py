"""The rounds of clustered attention in tiles: gather a tile's rows, compute, put the results in the tokens' places.

Forward: every round leaves its sums relative to its largest score, which are merged at each query's place.
Backward: with the merged output O and log-sum-exp L of a query, every round's weights are exp(s - L), so each cluster's
share of the gradient follows from the *merged* O and L alone, and shares add up. What is kept between the passes is
the inputs, the order, O and L: linear in the length, like one dense flash call. Nothing is gathered but a tile's rows.

Legend: G = B·H sequences of N tokens, as (G·N, D) rows; R rounds of S blocks; M queries and N keys a block.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.smyrf.layout import Layout
from attention.smyrf.pairs import Keys, Pairs
from attention.tiled import (
    HIDDEN,
    LN_2,
    LOG2_E,
    NARROW,
    Hide,
    Scratch,
    slices,
    tile_backward,
    tile_forward_,
    tile_shape,
)

GROUP_BYTES = 1 << 23  # of results that wait to be put in the tokens' places; one round at least


@torch.no_grad()
def attend_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv) -> out (B, H, Nq, Dv) in q's dtype and lse (B, H, Nq)."""
    # On a CPU products take as long as with their width rounded up to 16: what that leaves free sums the weights.
    spare = -v.shape[3] % NARROW
    sizes = k.shape[3], v.shape[3] + spare
    work = _Work(layout, q, k, sizes[1], 0)
    q_all, k_rows, v_rows = work.rows(q) * (scale * LOG2_E), work.rows(k), work.rows(v)
    kv_all = torch.cat([k_rows, v_rows, v_rows.new_ones(len(v_rows), spare)], dim=1)
    group_out, group_top = (work.group_buffer(work.q_rows, dim) for dim in (sizes[1], 1))  # (r·S, M, dim)
    results = group_out, None if spare else torch.empty_like(group_top), group_top
    merged = None
    for rounds in work.groups():
        for part in work.parts(rounds):
            k_tile, v_tile = work.scratch.gather("kv", kv_all, part.k_rows).split(sizes, dim=2)
            for queries, q_rows, hide_, keep in work.queries(part):
                q_tile = work.scratch.gather("q", q_all, q_rows)
                out, mass, top = (x if x is None else x[part.place, queries] for x in results)
                tile_forward_(out, mass, top, q_tile, k_tile, v_tile, hide_, keep, work.scratch)
        places = places_of(work.q_rows.view(work.num_rounds, -1)[rounds])
        merged = _merge_(merged, *_sums_of_group(*results, places, v.shape[3]))
    out, mass, top = merged
    mass = mass.clamp_min_(torch.finfo(mass.dtype).tiny)
    out, lse = out.div_(mass).contiguous(), mass.log2().add_(top)
    if not layout.all_visible:
        empty = lse < HIDDEN / 2
        out.masked_fill_(empty, 0.0), lse.masked_fill_(empty, -torch.inf)
    return out.to(q.dtype).view(*q.shape[:3], -1), lse.mul_(LN_2).view(q.shape[:3])


def _sums_of_group(
    out: Tensor, mass: Tensor | None, top: Tensor, places: Tensor, value_dim: int
) -> tuple[Tensor, Tensor, Tensor]:
    """What `tile_forward_` left of r rounds (r·S, M, dim) -> the queries' sums over them, (G·Nq, dim) each."""

    def take(x: Tensor) -> Tensor:
        return x.flatten().index_select(0, places.flatten()).view_as(places)  # (G·Nq, r)

    tops = take(top)
    top = tops.amax(dim=1, keepdim=True)
    weights = torch.exp2(tops - top)
    out = sum_rows(out, places, weights)
    mass = out[:, value_dim : value_dim + 1] if mass is None else (weights * take(mass)).sum(dim=1, keepdim=True)
    return out[:, :value_dim], mass, top


def _merge_(
    merged: tuple[Tensor, Tensor, Tensor] | None, out: Tensor, mass: Tensor, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of a group of rounds added to those of others, in place."""
    if merged is None:
        return out, mass, top
    highest = torch.maximum(merged[2], top)
    weight, weight_before = torch.exp2(top - highest), torch.exp2(merged[2] - highest)
    for total, addend in zip(merged[:2], (out, mass), strict=True):
        total.mul_(weight_before).addcmul_(addend, weight)
    return *merged[:2], highest


@torch.no_grad()
def attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    layout: Layout,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `attend_forward`."""
    work = _Work(layout, q, k, q.shape[3], k.shape[3] + v.shape[3])
    grad_out = work.rows(grad_out)
    delta = (grad_out * work.rows(out)).sum(dim=1, keepdim=True)  # (G·Nq, 1)
    delta = delta if grad_lse is None else delta - grad_lse.reshape(-1, 1)
    lse = lse.reshape(-1, 1) * LOG2_E
    lse = lse.masked_fill(lse == -torch.inf, -HIDDEN)  # these queries saw no key: exp2(s - huge) = 0
    q_all = torch.cat([work.rows(q) * (scale * LOG2_E), lse, grad_out, delta], dim=1)
    k_rows, v_rows = work.rows(k), work.rows(v)
    minus_one = -k_rows.new_ones(len(k_rows), 1)
    kv_all = torch.cat([k_rows, minus_one, v_rows, minus_one], dim=1)
    sizes, tile_sizes = (k.shape[3], v.shape[3]), (k.shape[3] + 1, v.shape[3] + 1)
    grad_q, grad_kv = q_all.new_zeros(len(q_all), sizes[0]), q_all.new_zeros(len(kv_all), sum(sizes))
    group_q = work.group_buffer(work.q_rows, q.shape[3])  # (r·S, M, D)
    group_kv = work.group_buffer(work.k_rows, sum(sizes))  # (r·S, N, D + Dv)
    for rounds in work.groups():
        for part in work.parts(rounds):
            k_tile, v_tile = work.scratch.gather("kv", kv_all, part.k_rows).split(tile_sizes, dim=2)
            grads = None, None
            for queries, q_rows, hide_, keep in work.queries(part):
                q_tile, grad_tile = work.scratch.gather("q", q_all, q_rows).split(tile_sizes, dim=2)
                group_q[part.place, queries], *grads = tile_backward(
                    grad_tile, q_tile, k_tile, v_tile, hide_, keep, *grads, work.scratch
                )
            for result, grad in zip(group_kv[part.place].split(sizes, dim=2), grads, strict=True):
                result.copy_(grad.mT)
        for total, rows, results in ((grad_q, work.q_rows, group_q), (grad_kv, work.k_rows, group_kv)):
            rows = rows.view(work.num_rounds, -1)[rounds]
            if rows.shape[1] == len(total):
                total += sum_rows(results, places_of(rows))
            else:  # keys of a band are in several blocks
                total.index_add_(0, rows.flatten(), results.flatten(0, 1)[: rows.numel()])
    grad_k, grad_v = grad_kv.split(sizes, dim=1)
    grads = grad_q.mul_(scale), grad_k * LN_2, grad_v.contiguous()
    return tuple(grad.to(x.dtype).view(x.shape) for grad, x in zip(grads, (q, k, v), strict=True))


class _Part(NamedTuple):
    """Some blocks with their keys."""

    blocks: slice  # counted through all rounds
    place: slice  # counted from the first block of the group of rounds
    k_rows: Tensor  # (S_t, N)
    keys: Keys


class _Work:
    """What the two passes have in common: rounds in groups, their blocks in parts, and the queries of these in tiles.

    Rounds whose results are small, so many numbers a query and a key, make one group of r rounds.
    """

    def __init__(self, layout: Layout, q: Tensor, k: Tensor, q_result_dim: int, k_result_dim: int) -> None:
        self.layout = layout
        self.scratch = Scratch(q.device, torch.promote_types(q.dtype, torch.float32))
        self.num_rounds = len(layout.q_index)
        self.q_rows = to_rows(layout.q_index, q.shape[2])  # (R·S, M)
        self.k_rows = to_rows(layout.k_index, k.shape[2])  # (R·S, N)
        self.num_blocks = len(self.q_rows) // self.num_rounds  # S
        sizes = self.q_rows.shape[1], self.k_rows.shape[1]
        self.part_blocks, self.tile_queries = tile_shape(*sizes, self.scratch, layout.max_score_bytes)
        results = self.num_blocks * (sizes[0] * q_result_dim + sizes[1] * k_result_dim)  # of a round
        self.group_rounds = min(max(GROUP_BYTES // (self.scratch.dtype.itemsize * results), 1), self.num_rounds)  # r
        self.pairs = Pairs(layout, self.q_rows, self.k_rows, (q.shape[2], k.shape[2]), self.scratch)

    def rows(self, x: Tensor) -> Tensor:
        """(B, H, N, D) -> (G·N, D), contiguous and in full precision."""
        return x.flatten(0, 2).to(self.scratch.dtype).contiguous()

    def group_buffer(self, rows: Tensor, dim: int) -> Tensor:
        """(r·S, M or N, dim), for a group's results of the queries or the keys of `rows`."""
        shape = (self.group_rounds * self.num_blocks, rows.shape[1], dim)
        return torch.empty(shape, dtype=self.scratch.dtype, device=self.scratch.device)

    def groups(self) -> Iterator[slice]:
        return slices(0, self.num_rounds, self.group_rounds)

    def parts(self, rounds: slice) -> Iterator[_Part]:
        first, last = rounds.start * self.num_blocks, rounds.stop * self.num_blocks
        for blocks in slices(first, last, self.part_blocks):
            k_rows = self.k_rows[blocks]
            place = slice(blocks.start - first, blocks.stop - first)
            yield _Part(blocks, place, k_rows, self.pairs.of_keys(k_rows, blocks))

    def queries(self, part: _Part) -> Iterator[tuple[slice, Tensor, Hide | None, Tensor | None]]:
        """For every tile: its queries of each block, their rows (S_t, M_t), and the rules for its pairs."""
        for queries in slices(0, self.q_rows.shape[1], self.tile_queries):
            q_rows = self.q_rows[part.blocks, queries]
            hide_ = None if self.layout.all_visible else partial(self.pairs.hide_, q_rows=q_rows, keys=part.keys)
            yield queries, q_rows, hide_, self.pairs.keep(q_rows, part.keys, part.blocks)


def places_of(rows: Tensor) -> Tensor:
    """Where the results of r rounds have those of a token, from which token each is of: (r, n) -> (n, r) below r·n."""
    by_token = rows * len(rows) + torch.arange(len(rows), device=rows.device)[:, None]
    dtype = torch.int32 if rows.numel() < 1 << 31 else torch.int64
    ranks = torch.arange(rows.numel(), dtype=dtype, device=rows.device)
    return torch.empty_like(ranks).scatter_(0, by_token.flatten(), ranks).view(-1, len(rows))


def sum_rows(x: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Sums over r of weights[n, r] * x[places[n, r]], where the rows of x are its first two dimensions: (n, D)."""
    return F.embedding_bag(places, x.flatten(0, 1), mode="sum", per_sample_weights=weights)


def to_rows(index: Tensor, num_tokens: int) -> Tensor:
    """Tokens of their sequence (R, B, H, L, M) -> rows among all sequences (R·B·H·L, M)."""
    num_sequences = index.shape[1] * index.shape[2]
    first_row = torch.arange(num_sequences, device=index.device).view(*index.shape[1:3], 1, 1) * num_tokens
    return (index + first_row).flatten(0, 3)
