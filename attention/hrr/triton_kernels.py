"""Triton kernels of HRR attention; `attention.hrr.triton_passes` launches them and says what each is for.

Legend: a program belongs to one pair of batch row and head (axis 0 of the grid). It is one of W workers (axis 1), and
takes every W-th tile of M tokens, `steps` in all, of which the last may lie beyond the N tokens. P is D rounded up to
a power of two; columns beyond D hold zeros. Workers leave partial sums, which their readers add up in the same order
every time.

β is divided by its largest entry, which no cosine depends on: then its Hankel matrix fits into any dtype.
"""

from __future__ import annotations

import triton
import triton.language as tl

TINY_SQUARE = tl.constexpr(1e-36)  # of `attention.hrr.cosine.TINY`


@triton.jit
def tile_pointers(base, stride_b, stride_h, stride_n, HEADS, rows, P: tl.constexpr):
    """(M, P) pointers to the rows (M,) of this program's batch row and head."""
    pair = tl.program_id(0)
    start = (pair // HEADS).to(tl.int64) * stride_b + (pair % HEADS).to(tl.int64) * stride_h
    return base + start + rows.to(tl.int64)[:, None] * stride_n + tl.arange(0, P)[None, :]


@triton.jit
def load_tile(
    base, stride_b, stride_h, stride_n, HEADS, rows, N, D: tl.constexpr, P: tl.constexpr, ONCE: tl.constexpr = False
):
    """(M, P) in the dtype of base, zeros beyond N and D. ONCE: no other kernel of this pass reads it."""
    pointers = tile_pointers(base, stride_b, stride_h, stride_n, HEADS, rows, P)
    inside = (rows < N)[:, None] & (tl.arange(0, P) < D)[None, :]
    return tl.load(pointers, mask=inside, other=0.0, eviction_policy="evict_first" if ONCE else "")


@triton.jit
def store_tile(base, stride_b, stride_h, stride_n, HEADS, rows, N, x, D: tl.constexpr, P: tl.constexpr):
    pointers = tile_pointers(base, stride_b, stride_h, stride_n, HEADS, rows, P)
    inside = (rows < N)[:, None] & (tl.arange(0, P) < D)[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def is_ignored(padding, HEADS, rows, N):
    """bool (M,): padding (B, N) is uint8, 1 = ignored."""
    row = (tl.program_id(0) // HEADS).to(tl.int64) * N
    return tl.load(padding + row + rows, mask=rows < N, other=1) != 0


@triton.jit
def product(x, y, SHORT: tl.constexpr, PRECISION: tl.constexpr):
    """x y, with x in the inputs' dtype or in float32, and y in float32.

    With SHORT, a dtype of 16 bits, a factor of another dtype is split into two of it, and the product of the two small
    parts is left out: 16 bits of precision at least. Without, PRECISION says how float32 factors are multiplied.
    """
    if SHORT is None:
        return tl.dot(x, y, input_precision=PRECISION)
    else:
        x_high, y_high = x.to(SHORT), y.to(SHORT)
        y_low = (y - y_high.to(tl.float32)).to(SHORT)
        result = tl.dot(x_high, y_low, acc=tl.dot(x_high, y_high))
        if x.dtype != SHORT:
            x_low = (x.to(tl.float32) - x_high.to(tl.float32)).to(SHORT)
            result = tl.dot(x_low, y_high, acc=result)
        return result


@triton.jit
def sum_partials(partials, workers, D: tl.constexpr, P: tl.constexpr):
    """(P,): the sum over workers of partials (workers, B·H, D) of this program's pair."""
    columns = tl.arange(0, P)[None, :]
    total = tl.zeros([32, P], tl.float32)
    for start in range(0, workers, 32):  # one by one, each would wait for memory
        worker = start + tl.arange(0, 32)[:, None]
        row = (worker * tl.num_programs(0) + tl.program_id(0)) * D
        total += tl.load(partials + row + columns, mask=(worker < workers) & (columns < D), other=0.0)
    return tl.sum(total, 0)


@triton.jit
def sum_scalars(partials, workers, BLOCK: tl.constexpr):
    """The sum over workers of partials (B·H, workers) of this program's pair."""
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, workers, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partials + tl.program_id(0) * workers + index, mask=index < workers, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def hankel(x, D: tl.constexpr, P: tl.constexpr):
    """(P,) -> (P, P) with entry [i, n] = x[(i + n) mod D] for i, n < D, else 0."""
    i, n = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    matrix = tl.gather(tl.broadcast_to(x[None, :], (P, P)), (i + n) % D, axis=1)
    return tl.where((i < D) & (n < D), matrix, 0.0)


@triton.jit
def sum_antidiagonals(matrix, D: tl.constexpr, P: tl.constexpr):
    """(P, P) -> (P,): Σ_i matrix[i, (n - i) mod D], right for n < D."""
    i, n = tl.arange(0, P)[:, None], tl.arange(0, P)[None, :]
    return tl.sum(tl.gather(matrix, (n - i + P // D * D + D) % D, axis=1), 0)


@triton.jit
def inverse_scale(bound):
    """1 / max |β|; 0 for zeros."""
    top = tl.max(tl.abs(bound), 0)
    return tl.where(top > 0.0, 1.0 / top, 0.0)


@triton.jit
def inverse_norm(x):
    """(M, P) -> (M,): 1 / |x|, 0 for zeros."""
    square = tl.sum(x * x, 1)
    return tl.where(square > TINY_SQUARE, 1.0 / tl.sqrt(square), 0.0)


@triton.jit
def bind_kernel(
    k,
    v,
    padding,  # uint8 (B, N), or None
    partials,  # float32 (workers, B·H, D): out
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    HEADS, N, steps,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """β, by worker: S = Σ k vᵀ over its tokens, then the sums of S's anti-diagonals."""
    state = tl.zeros([P, P], tl.float32)
    for step in range(steps):
        rows = (step * tl.num_programs(1) + tl.program_id(1)) * M + tl.arange(0, M)
        keys = load_tile(k, k_b, k_h, k_n, HEADS, rows, N, D, P, True)
        values = load_tile(v, v_b, v_h, v_n, HEADS, rows, N, D, P)
        if padding is not None:
            keys = tl.where(is_ignored(padding, HEADS, rows, N)[:, None], 0.0, keys).to(k.dtype.element_ty)
        state = tl.dot(tl.trans(keys), values, acc=state, input_precision=PRECISION)
    columns = tl.arange(0, P)
    row = (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * D
    tl.store(partials + row + columns, sum_antidiagonals(state, D, P), mask=columns < D)


@triton.jit
def compare_kernel(
    q,
    v,
    padding,  # uint8 (B, N), or None
    partials,  # float32 (bind_workers, B·H, D)
    bound,  # float32 (B·H, D): out, β
    exponentials,  # float32 (B·H, N): out, exp(cosine), 0 where masked
    totals,  # float32 (B·H, workers): out, their sums by worker
    q_b, q_h, q_n,
    v_b, v_h, v_n,
    HEADS, N, steps, bind_workers,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Unbinds the queries and compares what they retrieve with the values."""
    pair, columns = tl.program_id(0), tl.arange(0, P)
    beta = sum_partials(partials, bind_workers, D, P)
    if tl.program_id(1) == 0:
        tl.store(bound + pair * D + columns, beta, mask=columns < D)
    unbinding = hankel(beta * inverse_scale(beta), D, P)
    total = tl.zeros([M], tl.float32)
    for step in range(steps):
        tile = (steps - 1 - step) * tl.num_programs(1) + tl.program_id(1)  # the cache still holds the last values
        rows = tile * M + tl.arange(0, M)
        queries = load_tile(q, q_b, q_h, q_n, HEADS, rows, N, D, P, True)
        retrieved = product(queries, unbinding, SHORT, PRECISION)
        values = load_tile(v, v_b, v_h, v_n, HEADS, rows, N, D, P).to(tl.float32)
        cosine = tl.sum(values * retrieved, 1) * inverse_norm(values) * inverse_norm(retrieved)
        exponential = tl.where(rows < N, tl.exp(cosine), 0.0)
        if padding is not None:
            exponential = tl.where(is_ignored(padding, HEADS, rows, N), 0.0, exponential)
        tl.store(exponentials + pair.to(tl.int64) * N + rows, exponential, mask=rows < N)
        total += exponential
    tl.store(totals + pair * tl.num_programs(1) + tl.program_id(1), tl.sum(total, 0))


@triton.jit
def weigh_kernel(
    v,
    weights,  # float32 (B·H, N): exponentials in, weights out
    totals,  # float32 (B·H, workers)
    out,
    v_b, v_h, v_n,
    out_b, out_h, out_n,
    HEADS, N, workers,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr,
    EMPTY_IS_UNIFORM: tl.constexpr,  # whether a row whose tokens are all masked gets the weights 1/N, not zeros
):  # fmt: skip
    total = sum_scalars(totals, workers, 128)
    rows = tl.program_id(1) * M + tl.arange(0, M)
    pointers = weights + tl.program_id(0).to(tl.int64) * N + rows
    weight = tl.load(pointers, mask=rows < N, other=0.0) / tl.where(total > 0.0, total, 1.0)
    if EMPTY_IS_UNIFORM:
        weight = tl.where(total > 0.0, weight, 1.0 / N)
    tl.store(pointers, weight, mask=rows < N)
    values = load_tile(v, v_b, v_h, v_n, HEADS, rows, N, D, P).to(tl.float32)
    store_tile(out, out_b, out_h, out_n, HEADS, rows, N, values * weight[:, None], D, P)
