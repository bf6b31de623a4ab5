"""Attention in rounds of blocks by batched products that keep the batch apart: any device, dropout, second derivatives.

What XLA gets: no flattened batch, so that a batch sharded over devices stays sharded; static shapes; no fallback. The
scores of a round are computed a few blocks at a time, and again in the backward pass instead of being kept, so that
`max_score_bytes` bounds them in both. With dropout they are kept.

Legend: R rounds, L blocks a sequence and round, M queries and N keys a block; C of the L blocks in a chunk.
"""

from __future__ import annotations

from functools import reduce
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.smyrf.clusters import inverse_order
from attention.smyrf.layout import Layout
from attention.tiled import DEVICE_TILE_SCORES, HIDDEN, slices


class _Rules(NamedTuple):
    """By which pairs of a chunk are hidden; a None hides nothing."""

    key_mask: Tensor | None  # bool (B, H, C, N)
    q_position: Tensor | None  # int64 (B, H, C, M)
    k_position: Tensor | None  # int64 (B, H, C, N)
    q_clusters: Tensor | None  # int64 (P, B, H, C, M), in the P rounds before this one
    k_clusters: Tensor | None  # int64 (P, B, H, C, N)

    def chunk(self, blocks: slice, queries: slice) -> _Rules:
        parts = {name: x[..., blocks, :] for name, x in self._asdict().items() if x is not None}
        return self._replace(**{name: x[..., queries] if name.startswith("q") else x for name, x in parts.items()})


def einsum_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, dropout: float = 0.0
) -> tuple[Tensor, Tensor]:
    """As `attention.smyrf.flash.flash_attend`; `dropout` is the probability of dropping an attention weight."""
    num_rounds = len(layout.q_index)
    clusters = (None, None)
    if layout.union and num_rounds > 1:
        clusters = tuple(_cluster_of_tokens(index) for index in (layout.q_index, layout.k_index))  # (R, B, H, N)
    rounds, last = [], None
    for i in range(num_rounds):
        out, lse, last = _attend_round(q, k, v, layout, i, clusters, scale, dropout, last)
        rounds.append((out, lse))
    outs, lses = (torch.stack(parts) for parts in zip(*rounds, strict=True))  # (R, B, H, Nq, Dv), (R, B, H, Nq)
    out = torch.einsum("rbhn,rbhnd->bhnd", torch.softmax(lses, dim=0).to(outs.dtype), outs)
    lse = torch.logsumexp(lses, dim=0)
    if layout.all_visible:
        return out, lse
    empty = lse < HIDDEN / 2
    return out.masked_fill(empty.unsqueeze(-1), 0.0), lse.masked_fill(empty, -torch.inf)


def _attend_round(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    i: int,
    clusters: tuple[Tensor | None, Tensor | None],
    scale: float,
    dropout: float,
    last: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Round i: out (B, H, Nq, Dv) and lse (B, H, Nq). `last` goes in and comes out: what was computed before."""
    shape = q.shape[:2]
    q_index, k_index = (index[i].expand(*shape, -1, -1) for index in (layout.q_index, layout.k_index))
    q_blocks, k_blocks, v_blocks = (
        _take_rows(x, index.flatten(2)).unflatten(2, index.shape[2:])
        for x, index in ((q, q_index), (k, k_index), (v, k_index))
    )  # (B, H, L, M or N, D or Dv)
    rules = _Rules(None, None, None, None, None)
    if layout.key_mask is not None:
        mask = layout.key_mask[:, None].expand(*shape, -1)
        rules = rules._replace(key_mask=mask.gather(-1, k_index.flatten(2)).view(k_index.shape))
    if layout.lag is not None or layout.reach is not None:
        rules = rules._replace(q_position=q_index, k_position=k_index)
    if layout.union and i > 0:
        q_clusters, k_clusters = (
            x[:i].gather(-1, index.flatten(2).expand(i, *shape, -1)).unflatten(-1, index.shape[2:])
            for x, index in zip(clusters, (q_index, k_index), strict=True)
        )
        rules = rules._replace(q_clusters=q_clusters, k_clusters=k_clusters)
    query_scores = shape.numel() * k_index.shape[3]
    max_scores = DEVICE_TILE_SCORES if layout.max_score_bytes is None else layout.max_score_bytes // 4
    num_queries = max(min(max_scores // query_scores, q_index.shape[3]), 1)
    num_blocks = max(max_scores // (query_scores * num_queries), 1)
    attend = _plain_blocks if dropout > 0 else _RecomputedBlocks.apply
    chunks = []
    # Split, not sliced: the gradient of a split is one concatenation, that of every slice as large as the whole.
    block_chunks = zip(*(x.split(num_blocks, dim=2) for x in (q_blocks, k_blocks, v_blocks)), strict=True)
    for blocks, (q_some, k_some, v_some) in zip(slices(0, q_index.shape[2], num_blocks), block_chunks, strict=True):
        parts = []
        for queries, q_chunk in zip(
            slices(0, q_index.shape[3], num_queries), q_some.split(num_queries, dim=3), strict=True
        ):
            q_chunk = q_chunk if last is None else _after(last, q_chunk)
            parts.append(
                attend(
                    q_chunk, k_some, v_some, (layout.lag, layout.reach, scale, dropout), *rules.chunk(blocks, queries)
                )
            )
            last = parts[-1][0]
        chunks.append([torch.cat(tensors, dim=3) for tensors in zip(*parts, strict=True)])
    out, lse = (torch.cat(tensors, dim=2).flatten(2, 3) for tensors in zip(*chunks, strict=True))
    rank = inverse_order(q_index.flatten(2))
    return _take_rows(out, rank), lse.gather(-1, rank), last


def _plain_blocks(
    q: Tensor, k: Tensor, v: Tensor, numbers: tuple[int | None, int | None, float, float], *rules: Tensor | None
) -> tuple[Tensor, Tensor]:
    """q (B, H, C, M, D), k (B, H, C, N, D), v (B, H, C, N, Dv) -> out (B, H, C, M, Dv) and lse (B, H, C, M).

    `numbers` are lag, reach, scale and dropout.
    """
    lag, reach, scale, dropout = numbers
    scores = _visible_scores(q * scale, k, lag, reach, _Rules(*rules))
    weights = F.dropout(torch.softmax(scores, dim=-1), dropout).to(v.dtype)
    return torch.einsum("bhcmn,bhcnd->bhcmd", weights, v), torch.logsumexp(scores, dim=-1)


class _RecomputedBlocks(torch.autograd.Function):
    """`_plain_blocks` without dropout, whose backward pass computes the scores again."""

    @staticmethod
    def forward(ctx, q, k, v, numbers, *rules):
        out, lse = _plain_blocks(q, k, v, numbers, *rules)
        ctx.save_for_backward(q, k, v, out, lse, *rules)
        ctx.numbers = numbers
        return out, lse

    @staticmethod
    def backward(ctx, grad_out, grad_lse):
        """With P = exp(s - lse): dV = Pᵀ dO and dS = P * (dO vᵀ - rowsum(dO * O) + d lse)."""
        q, k, v, out, lse, *rules = ctx.saved_tensors
        lag, reach, scale, _ = ctx.numbers
        # Scaled on the other side than before, so that XLA does not find the product equal and keep it till here;
        # and waiting for the gradient, so that it is not computed as soon as it can be.
        scores = _visible_scores(_after(grad_out, q), k * scale, lag, reach, _Rules(*rules))
        weights = (scores - lse.unsqueeze(-1)).exp()
        grad_v = torch.einsum("bhcmn,bhcmd->bhcnd", weights.to(grad_out.dtype), grad_out)
        delta = (grad_out * out).sum(dim=-1, dtype=lse.dtype) - grad_lse
        grad_scores = torch.einsum("bhcmd,bhcnd->bhcmn", grad_out, v).to(lse.dtype) - delta.unsqueeze(-1)
        grad_scores = (weights * grad_scores * scale).to(q.dtype)
        grad_q = torch.einsum("bhcmn,bhcnd->bhcmd", grad_scores, k)
        grad_k = torch.einsum("bhcmn,bhcmd->bhcnd", grad_scores, q)
        return grad_q, grad_k, grad_v, None, *(None for _ in rules)


def _visible_scores(q: Tensor, k: Tensor, lag: int | None, reach: int | None, rules: _Rules) -> Tensor:
    """q kᵀ (B, H, C, M, N) in float32 at least; HIDDEN where a pair is not visible or has met in an earlier round.

    HIDDEN is finite, so that a query without keys has finite gradients; beside a round with keys it weighs nothing.
    """
    scores = torch.einsum("bhcmd,bhcnd->bhcmn", q, k)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    hidden = []
    if rules.key_mask is not None:
        hidden.append(rules.key_mask.unsqueeze(-2))
    if lag is not None:
        hidden.append((rules.q_position - lag).unsqueeze(-1) < rules.k_position.unsqueeze(-2))
    if reach is not None:
        hidden.append((rules.q_position - reach).unsqueeze(-1) > rules.k_position.unsqueeze(-2))
    if rules.q_clusters is not None:
        hidden += (rules.q_clusters.unsqueeze(-1) == rules.k_clusters.unsqueeze(-2)).unbind()
    return scores.masked_fill(reduce(torch.logical_or, hidden), HIDDEN) if hidden else scores


def _after(first: Tensor, x: Tensor) -> Tensor:
    """x, but not before `first` is known. In both passes, since the gradient of `first` then waits for that of x.

    XLA would compute independent chunks in any order, and hold the scores of all.
    """
    return x + 0.0 * first[:, :, :1, :1, :1]


def _take_rows(x: Tensor, index: Tensor) -> Tensor:
    """x (B, H, N, D), index (B, H, M) -> (B, H, M, D), as a gather, which XLA divides among devices with the batch."""
    return torch.take_along_dim(x, index.unsqueeze(-1), dim=2)


def _cluster_of_tokens(index: Tensor) -> Tensor:
    """(R, B, H, L, M), every token once a round -> (R, B, H, N): the block that holds the token."""
    return inverse_order(index.flatten(3)) // index.shape[4]
