"""The backward kernels of the Triton back-end, and their launches.

Legend: G = B·H sequences of Nq queries and Nk keys, as contiguous (G·N, D) rows; L clusters a sequence, of Cq queries
and Ck keys each; R rounds. A program owns a block of the keys of one cluster in one round and walks over the cluster's
queries. It computes the scores and their gradients once, for all three gradients:

- dK and dV add up in the program and are written once, to the keys' rows of that round;
- its share of dQ goes to a slot of its own, a slot for every key block of the cluster.

Slots and rounds are summed at the end: no atomics, and the same result from run to run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.smyrf.triton_tiles import (
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
    triton.Config({"BLOCK_Q": block_q}, num_warps, num_stages)
    for block_q, num_warps, num_stages in ((64, 8, 2), (64, 8, 3), (32, 8, 2), (32, 8, 3), (32, 8, 1))
]

STATS_BLOCK = 32  # rows a program
MIN_SLOTS = 4  # key blocks of a cluster that are at work at a time, each with a copy of dQ
MIN_PROGRAMS = 512  # more slots where there are few clusters, to fill a large GPU


@triton.jit
def stats_kernel(
    grad_out,  # (G·Nq, Dv)
    out,  # (G·Nq, Dv)
    grad_lse,  # float32 (G·Nq,)
    lse,  # float32 (G·Nq,)
    stats,  # float32 (G·Nq, 2), written
    num_rows,  # G·Nq
    VALUE_DIM: tl.constexpr,
    VALUE_WIDTH: tl.constexpr,  # Dv, padded
    BLOCK: tl.constexpr,
):
    """Of every query, the log-sum-exp in base 2, and delta = rowsum(grad_out * out) - grad_lse.

    The derivative of lse by a score is its weight, so grad_lse enters where delta does.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    real = rows < num_rows
    rows = tl.where(real, rows, 0)
    products = load_rows(grad_out, rows, VALUE_DIM, 0, VALUE_WIDTH).to(tl.float32)
    products *= load_rows(out, rows, VALUE_DIM, 0, VALUE_WIDTH).to(tl.float32)
    row_lse = tl.load(lse + rows)
    # A query that saw no key: exp2(s - inf) = 0, where exp2(s + inf) would be no number.
    row_lse = tl.where(row_lse == float("-inf"), float("inf"), row_lse * LOG2_E)
    tl.store(stats + 2 * rows, row_lse, mask=real)
    tl.store(stats + 2 * rows + 1, tl.sum(products, 1) - tl.load(grad_lse + rows), mask=real)


@autotune(CONFIGS, key=["SIZES", "DIM", "VALUE_DIM", "CAUSAL", "PRECISION"])
@triton.jit(do_not_specialize=["num_sequences", "num_heads", "num_clusters", "lag", "first_block", "slots"])
def backward_kernel(
    grad_out,  # (G·Nq, Dv)
    q,  # (G·Nq, D)
    k,  # (G·Nk, D)
    v,  # (G·Nk, Dv)
    q_order,  # int64 (Rounds of the launch, G, Nq)
    k_order,  # int64 (Rounds, G, Nk)
    q_ids,  # int32 (EARLIER, G, Nq) or None, as in the forward kernel; with EARLIER > 0, Rounds is 1
    k_ids,  # int32 (EARLIER, G, Nk) or None
    padding,  # uint8 (B, Nk), or None
    stats,  # int64 (Rounds, G, Nq), of every rank: two float32, as `stats_kernel` writes them
    grad_q,  # (Rounds, G, slots, Nq, D)
    grad_k,  # (Rounds, G, Nk, D)
    grad_v,  # (Rounds, G, Nk, Dv)
    num_sequences,  # G
    num_heads,  # H
    num_clusters,  # L
    q_size,  # Cq
    k_size,  # Ck
    scale,  # of the scores, without log2(e); positive
    lag,
    first_block,  # key blocks first_block ... first_block + slots of every cluster, each with its own slot of grad_q
    slots,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,  # D, padded
    VALUE_WIDTH: tl.constexpr,  # the first columns of Dv
    VALUE_REST: tl.constexpr,  # the rest of them, padded; 0 where there are none
    CAUSAL: tl.constexpr,
    EARLIER: tl.constexpr,
    ADD: tl.constexpr,  # to what grad_q holds
    PRECISION: tl.constexpr,
    SIZES: tl.constexpr,  # Cq and Ck rounded up to powers of two: what is tuned for one length serves others
    WHOLE_Q: tl.constexpr,  # blocks divide clusters
    WHOLE_K: tl.constexpr,  # every key of every block is there
    BLOCK_K: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """The share of one key block in all gradients, from weights P = exp(s - lse) with the merged log-sum-exp.

    dV = Pᵀ dO,  dS = P * (dO Vᵀ - delta),  dQ = scale dS K,  dK = scale dSᵀ Q. Everything is held transposed, keys
    first, as dK and dV want it.
    Source: Dao et al. 2022, arXiv:2205.14135, appendix B.
    """
    cluster = (tl.program_id(0) // slots).to(tl.int64)  # of Rounds·G·L
    slot = tl.program_id(0) % slots
    round_sequence = cluster // num_clusters  # of Rounds·G
    sequence = round_sequence % num_sequences
    num_queries, num_keys = num_clusters * q_size, num_clusters * k_size

    k_rank = (first_block + slot) * BLOCK_K + tl.arange(0, BLOCK_K)
    k_real = k_rank < k_size
    k_tokens = tl.load(k_order + cluster * k_size + k_rank, mask=k_real, other=0)
    k_rows = sequence * num_keys + k_tokens
    k_tile = load_rows(k, k_rows, DIM, 0, WIDTH)
    v_tile = load_rows(v, k_rows, VALUE_DIM, 0, VALUE_WIDTH)
    k_visible = k_real
    if padding is not None:
        k_visible = k_real & (tl.load(padding + sequence // num_heads * num_keys + k_tokens) == 0)
    k_sum = tl.zeros([BLOCK_K, WIDTH], tl.float32)
    v_sum = tl.zeros([BLOCK_K, VALUE_WIDTH], tl.float32)
    if VALUE_REST:
        v_rest = load_rows(v, k_rows, VALUE_DIM, VALUE_WIDTH, VALUE_REST)
        v_rest_sum = tl.zeros([BLOCK_K, VALUE_REST], tl.float32)

    for start in range(0, q_size, BLOCK_Q):
        q_rank = start + tl.arange(0, BLOCK_Q)
        q_real = q_rank < q_size
        q_tokens = tl.load(q_order + cluster * q_size + q_rank, mask=q_real, other=0)
        q_rows = sequence * num_queries + q_tokens
        q_tile = load_rows(q, q_rows, DIM, 0, WIDTH)
        grad_tile = load_rows(grad_out, q_rows, VALUE_DIM, 0, VALUE_WIDTH)
        both = tl.load(stats + cluster * q_size + q_rank, mask=q_real, other=0)
        lse = both.to(tl.int32).to(tl.float32, bitcast=True)
        delta = (both >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        scores = tl.dot(k_tile, tl.trans(q_tile), input_precision=PRECISION)  # (BLOCK_K, BLOCK_Q)
        weights = tl.exp2(scores * (scale * LOG2_E) - lse[None, :])
        if not WHOLE_Q:
            weights = tl.where(q_real[None, :], weights, 0.0)
        if padding is not None or not WHOLE_K:
            weights = tl.where(k_visible[:, None], weights, 0.0)
        if CAUSAL:
            later = k_tokens.to(tl.int32)[:, None] > (q_tokens - lag).to(tl.int32)[None, :]
            weights = tl.where(later, 0.0, weights)
        for earlier in tl.static_range(EARLIER):
            first = earlier * num_sequences * num_clusters + cluster
            q_cluster = tl.load(q_ids + first * q_size + q_rank, mask=q_real, other=0)
            k_cluster = tl.load(k_ids + first * k_size + k_rank, mask=k_real, other=0)
            weights = tl.where(k_cluster[:, None] == q_cluster[None, :], 0.0, weights)
        rounded = weights.to(grad_tile.dtype)
        v_sum = tl.dot(rounded, grad_tile, v_sum, input_precision=PRECISION)
        grad_weights = tl.dot(v_tile, tl.trans(grad_tile), input_precision=PRECISION)
        if VALUE_REST:
            grad_rest = load_rows(grad_out, q_rows, VALUE_DIM, VALUE_WIDTH, VALUE_REST)
            v_rest_sum = tl.dot(rounded, grad_rest, v_rest_sum, input_precision=PRECISION)
            grad_weights = tl.dot(v_rest, tl.trans(grad_rest), grad_weights, input_precision=PRECISION)
        grad_scores = (weights * (grad_weights - delta[None, :])).to(q_tile.dtype)
        k_sum = tl.dot(grad_scores, q_tile, k_sum, input_precision=PRECISION)
        q_share = tl.dot(tl.trans(grad_scores), k_tile, input_precision=PRECISION) * scale  # (BLOCK_Q, WIDTH)
        slot_rows = (round_sequence * slots + slot) * num_queries + q_tokens
        if ADD:
            q_share += load_rows(grad_q, slot_rows, DIM, 0, WIDTH).to(tl.float32)
        store_rows(grad_q, slot_rows, q_real, q_share, DIM, 0, WIDTH)

    k_rows = round_sequence * num_keys + k_tokens
    store_rows(grad_k, k_rows, k_real, k_sum * scale, DIM, 0, WIDTH)
    store_rows(grad_v, k_rows, k_real, v_sum, VALUE_DIM, 0, VALUE_WIDTH)
    if VALUE_REST:
        store_rows(grad_v, k_rows, k_real, v_rest_sum, VALUE_DIM, VALUE_WIDTH, VALUE_REST)


def launch_backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_clusters: int,
    scale: float,
    lag: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; arguments as `smyrf::triton_backward`."""
    num_rounds, batch_size, num_heads, num_queries = q_order.shape
    num_keys, value_dim = v.shape[2:]
    value_width, value_rest = value_widths(value_dim)
    dim, num_sequences = q.shape[3], batch_size * num_heads
    q_size, k_size = num_queries // num_clusters, num_keys // num_clusters
    precision = dot_precision(q.dtype)
    block_k = key_block(q, v, k_size, precision)
    num_blocks = -(-k_size // block_k)
    slots = min(num_blocks, max(MIN_SLOTS, MIN_PROGRAMS // (num_rounds * num_sequences * num_clusters)))
    padding = None if key_padding_mask is None else key_padding_mask.view(torch.uint8)

    stats = torch.empty(*q.shape[:3], 2, dtype=torch.float32, device=q.device)
    stats_kernel[(-(-lse.numel() // STATS_BLOCK),)](
        grad_out, out, grad_lse, lse, stats, lse.numel(), value_dim, padded_dim(value_dim), STATS_BLOCK
    )
    stats = stats.view(torch.int64).squeeze(-1).expand(q_order.shape).gather(-1, q_order)  # (R, B, H, Nq)

    grad_q = q.new_empty(num_rounds, num_sequences, slots, num_queries, dim)
    grad_k = k.new_empty(num_rounds, num_sequences, num_keys, dim)
    grad_v = v.new_empty(num_rounds, num_sequences, num_keys, value_dim)
    # Rounds that must know the rounds before them are compiled, and launched, one by one.
    launches = [slice(0, num_rounds)] if q_ids is None else [slice(r, r + 1) for r in range(num_rounds)]
    for rounds in launches:
        for first_block in range(0, num_blocks, slots):
            backward_kernel[((rounds.stop - rounds.start) * num_sequences * num_clusters * slots,)](
                grad_out,
                q,
                k,
                v,
                q_order[rounds],
                k_order[rounds],
                ids_of_earlier_rounds(q_ids, q_order, rounds.start),
                ids_of_earlier_rounds(k_ids, k_order, rounds.start),
                padding,
                stats[rounds],
                grad_q[rounds],
                grad_k[rounds],
                grad_v[rounds],
                num_sequences,
                num_heads,
                num_clusters,
                q_size,
                k_size,
                scale,
                lag or 0,
                first_block,
                slots,
                DIM=dim,
                VALUE_DIM=value_dim,
                WIDTH=padded_dim(dim),
                VALUE_WIDTH=value_width,
                VALUE_REST=value_rest,
                CAUSAL=lag is not None,
                EARLIER=rounds.start,
                ADD=first_block > 0,
                PRECISION=precision,
                SIZES=(padded_dim(q_size), padded_dim(k_size)),
                BLOCK_K=block_k,
                WHOLE_Q=is_whole(q_size),
                WHOLE_K=k_size % block_k == 0 and num_blocks % slots == 0,
            )
    return grad_q.sum((0, 2)).view_as(q), grad_k.sum(0).view_as(k), grad_v.sum(0).view_as(v)


def key_block(q: Tensor, v: Tensor, k_size: int, precision: str) -> int:
    """Keys of one program: as many as registers hold the sums of, (block, D) and (block, Dv) in float32."""
    block = 128 if q.dtype is not torch.float32 else 64 if precision == "tf32" else 32
    if padded_dim(q.shape[-1]) + padded_dim(v.shape[-1]) > 192:
        block //= 2
    return min(block, padded_dim(k_size))
