"""The forward kernel of the Triton back-end, and its launches.

Legend: G = B·H sequences of Nq queries and Nk keys, as contiguous (G·N, D) rows; L clusters a sequence, of Cq queries
and Ck keys each; R rounds. A program owns a block of the queries of one cluster and walks over the cluster's keys,
gathering rows by the cluster order. A query occurs once a round, so programs of a round never write to the same row.

Scores are in base 2, with log2(e) folded into their scale: the hardware's exponential is exp2.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.smyrf.triton_tiles import (
    LN_2,
    LOG2_E,
    autotune,
    dot_precision,
    ids_of_earlier_rounds,
    is_whole,
    load_rows,
    padded_dim,
    store_rows,
    value_widths,
)

CONFIGS = [
    triton.Config({"BLOCK_Q": block_q, "BLOCK_K": block_k}, num_warps, num_stages)
    for block_q, block_k, num_warps, num_stages in (
        (128, 64, 8, 3),
        (128, 128, 8, 3),
        (64, 128, 4, 3),
        (64, 64, 4, 3),
        (64, 32, 4, 2),
    )
]


@autotune(CONFIGS, key=["SIZES", "DIM", "VALUE_DIM", "CAUSAL", "PRECISION"])
@triton.jit(do_not_specialize=["num_sequences", "num_heads", "num_clusters", "lag"])
def forward_kernel(
    q,  # (G·Nq, D)
    k,  # (G·Nk, D)
    v,  # (G·Nk, Dv)
    q_order,  # int64 (G, Nq), of this round
    k_order,  # int64 (G, Nk), of this round
    q_ids,  # int32 (EARLIER, G, Nq), of this round's ranks: clusters of their tokens in earlier rounds, or None
    k_ids,  # int32 (EARLIER, G, Nk), or None
    padding,  # uint8 (B, Nk), 1 = ignored, or None
    out,  # (G·Nq, Dv): read unless FIRST, then written
    lse,  # float32 (G·Nq,): the same
    num_sequences,  # G
    num_heads,  # H
    num_clusters,  # L
    q_size,  # Cq
    k_size,  # Ck
    scale,  # of the scores, times log2(e); positive
    lag,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded
    VALUE_WIDTH: tl.constexpr,  # the first columns of Dv
    VALUE_REST: tl.constexpr,  # the rest of them, padded; 0 where there are none
    CAUSAL: tl.constexpr,
    EARLIER: tl.constexpr,  # rounds whose pairs do not count again
    FIRST: tl.constexpr,
    PRECISION: tl.constexpr,
    SIZES: tl.constexpr,  # Cq and Ck rounded up to powers of two: what is tuned for one length serves others
    WHOLE_K: tl.constexpr,  # blocks divide clusters
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One round, merged into the rounds before: their output and log-sum-exp start the online softmax.

    Source: Dao 2023, arXiv:2307.08691, section 3.1.
    """
    blocks = tl.cdiv(q_size, BLOCK_Q)
    cluster = (tl.program_id(0) // blocks).to(tl.int64)  # of G·L
    sequence = cluster // num_clusters
    first_q_row = sequence * num_clusters * q_size
    first_k_row = sequence * num_clusters * k_size

    q_rank = tl.program_id(0) % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    q_real = q_rank < q_size
    q_tokens = tl.load(q_order + cluster * q_size + q_rank, mask=q_real, other=0)
    q_rows = first_q_row + q_tokens
    q_tile = load_rows(q, q_rows, DIM, 0, WIDTH)
    if FIRST:
        top = tl.full([BLOCK_Q], float("-inf"), tl.float32)  # running maximum of the scores
        mass = tl.zeros([BLOCK_Q], tl.float32)  # running Σ exp2(score - top)
        acc = tl.zeros([BLOCK_Q, VALUE_WIDTH], tl.float32)  # running Σ exp2(score - top) v
        if VALUE_REST:
            rest_acc = tl.zeros([BLOCK_Q, VALUE_REST], tl.float32)
    else:
        top = tl.load(lse + q_rows) * LOG2_E
        mass = tl.full([BLOCK_Q], 1.0, tl.float32)
        acc = load_rows(out, q_rows, VALUE_DIM, 0, VALUE_WIDTH).to(tl.float32)
        if VALUE_REST:
            rest_acc = load_rows(out, q_rows, VALUE_DIM, VALUE_WIDTH, VALUE_REST).to(tl.float32)

    for start in range(0, k_size, BLOCK_K):
        k_rank = start + tl.arange(0, BLOCK_K)
        k_real = k_rank < k_size
        k_tokens = tl.load(k_order + cluster * k_size + k_rank, mask=k_real, other=0)
        k_rows = first_k_row + k_tokens
        k_tile = load_rows(k, k_rows, DIM, 0, WIDTH)
        v_tile = load_rows(v, k_rows, VALUE_DIM, 0, VALUE_WIDTH)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)  # (BLOCK_Q, BLOCK_K)
        if padding is not None:
            first_key = sequence // num_heads * num_clusters * k_size
            k_real = k_real & (tl.load(padding + first_key + k_tokens) == 0)
        if padding is not None or not WHOLE_K:
            scores = tl.where(k_real[None, :], scores, float("-inf"))
        if CAUSAL:
            later = k_tokens.to(tl.int32)[None, :] > (q_tokens - lag).to(tl.int32)[:, None]
            scores = tl.where(later, float("-inf"), scores)
        for earlier in tl.static_range(EARLIER):
            first = earlier * num_sequences * num_clusters + cluster
            q_cluster = tl.load(q_ids + first * q_size + q_rank, mask=q_real, other=0)
            k_cluster = tl.load(k_ids + first * k_size + k_rank, mask=k_real, other=0)
            scores = tl.where(q_cluster[:, None] == k_cluster[None, :], float("-inf"), scores)
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # A query that has seen no key yet: exp2(-inf - 0) = 0, where exp2(-inf + inf) would be no number.
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        weights = tl.exp2(scores * scale - base[:, None])
        decay = tl.exp2(top - base)
        mass = mass * decay + tl.sum(weights, 1)
        weights = weights.to(v_tile.dtype)
        acc = tl.dot(weights, v_tile, acc * decay[:, None], input_precision=PRECISION)
        if VALUE_REST:
            v_rest = load_rows(v, k_rows, VALUE_DIM, VALUE_WIDTH, VALUE_REST)
            rest_acc = tl.dot(weights, v_rest, rest_acc * decay[:, None], input_precision=PRECISION)
        top = new_top

    share = (1.0 / tl.where(mass == 0.0, 1.0, mass))[:, None]
    store_rows(out, q_rows, q_real, acc * share, VALUE_DIM, 0, VALUE_WIDTH)
    if VALUE_REST:
        store_rows(out, q_rows, q_real, rest_acc * share, VALUE_DIM, VALUE_WIDTH, VALUE_REST)
    tl.store(lse + q_rows, (top + tl.log2(mass)) * LN_2, mask=q_real)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    num_clusters: int,
    scale: float,
    lag: int | None,
) -> tuple[Tensor, Tensor]:
    """One launch a round, each merging its round into the output in place; arguments as `smyrf::triton_forward`."""
    batch_size, num_heads, num_queries, dim = q.shape
    num_keys, value_dim = v.shape[2:]
    value_width, value_rest = value_widths(value_dim)
    q_size, k_size = num_queries // num_clusters, num_keys // num_clusters
    out = q.new_empty(*q.shape[:3], value_dim)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    padding = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)

    kernel, tuned = forward_kernel, {}

    def grid(options: dict) -> tuple[int]:
        return (batch_size * num_heads * num_clusters * -(-q_size // options["BLOCK_Q"]),)

    for this_round in range(len(q_order)):
        kernel[grid](
            q,
            k,
            v,
            q_order[this_round],
            k_order[this_round],
            ids_of_earlier_rounds(q_ids, q_order, this_round),
            ids_of_earlier_rounds(k_ids, k_order, this_round),
            padding,
            out,
            lse,
            batch_size * num_heads,
            num_heads,
            num_clusters,
            q_size,
            k_size,
            scale * LOG2_E.value,
            lag or 0,
            DIM=dim,
            VALUE_DIM=value_dim,
            WIDTH=padded_dim(dim),
            VALUE_WIDTH=value_width,
            VALUE_REST=value_rest,
            CAUSAL=lag is not None,
            EARLIER=0 if q_ids is None else this_round,
            FIRST=this_round == 0,
            PRECISION=dot_precision(q.dtype),
            SIZES=(padded_dim(q_size), padded_dim(k_size)),
            WHOLE_K=is_whole(k_size),
            **tuned,
        )
        # Choosing among configurations takes as long as launching: once is enough.
        kernel, tuned = forward_kernel.fn, forward_kernel.best_config.all_kwargs()
    return out, lse
