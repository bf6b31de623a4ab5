"""Triton kernels of the backward pass of HRR attention; legend in `attention.hrr.triton_kernels`.

The gradient of a cosine is w (γ - δ), and δ is known only after all tokens. All that β's gradient needs is linear in
it, so one pass sums up the two parts, and the next one forms every gradient: q and v are read twice, all else once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attention.hrr.triton_kernels import (
    hankel,
    inverse_norm,
    inverse_scale,
    is_ignored,
    load_tile,
    product,
    store_tile,
    sum_antidiagonals,
    sum_partials,
    sum_scalars,
)


@triton.jit
def load_weights(weights, grad_weights, grads, values, rows, N):
    """w (M,) and γ = g·v + (gradient of w) (M,)."""
    index = tl.program_id(0).to(tl.int64) * N + rows
    weight = tl.load(weights + index, mask=rows < N, other=0.0)
    gamma = tl.load(grad_weights + index, mask=rows < N, other=0.0) + tl.sum(grads * values, 1)
    return weight, gamma


@triton.jit
def sum_gradients_kernel(
    q,
    v,
    grad_out,
    weights,  # float32 (B·H, N)
    grad_weights,  # float32 (B·H, N)
    bound,  # float32 (B·H, D)
    partials_a,  # float32 (workers, B·H, D): out, the gradient of β / max |β| with δ = 0
    partials_b,  # float32 (workers, B·H, D): out, what to subtract from it δ times
    deltas,  # float32 (B·H, workers): out, Σ w γ
    q_b, q_h, q_n,
    v_b, v_h, v_n,
    g_b, g_h, g_n,
    HEADS, N, steps,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, columns = tl.program_id(0), tl.arange(0, P)
    beta = tl.load(bound + pair * D + columns, mask=columns < D, other=0.0)
    unbinding = hankel(beta * inverse_scale(beta), D, P)
    state_a, state_b = tl.zeros([P, P], tl.float32), tl.zeros([P, P], tl.float32)
    delta = tl.zeros([M], tl.float32)
    for step in range(steps):
        rows = (step * tl.num_programs(1) + tl.program_id(1)) * M + tl.arange(0, M)
        queries = load_tile(q, q_b, q_h, q_n, HEADS, rows, N, D, P)
        values = load_tile(v, v_b, v_h, v_n, HEADS, rows, N, D, P).to(tl.float32)
        grads = load_tile(grad_out, g_b, g_h, g_n, HEADS, rows, N, D, P).to(tl.float32)
        weight, gamma = load_weights(weights, grad_weights, grads, values, rows, N)
        retrieved = product(queries, unbinding, SHORT, PRECISION)
        inverse_v, inverse_r = inverse_norm(values), inverse_norm(retrieved)
        cosine = tl.sum(values * retrieved, 1) * inverse_v * inverse_r
        # The gradient of r is that of the cosine times this.
        direction = (inverse_v * inverse_r)[:, None] * values - (cosine * inverse_r * inverse_r)[:, None] * retrieved
        direction = direction * weight[:, None]
        transposed = tl.trans(queries)
        state_a += product(transposed, direction * gamma[:, None], SHORT, PRECISION)
        state_b += product(transposed, direction, SHORT, PRECISION)
        delta += weight * gamma
    row = (tl.program_id(1) * tl.num_programs(0) + pair) * D
    tl.store(partials_a + row + columns, sum_antidiagonals(state_a, D, P), mask=columns < D)
    tl.store(partials_b + row + columns, sum_antidiagonals(state_b, D, P), mask=columns < D)
    tl.store(deltas + pair * tl.num_programs(1) + tl.program_id(1), tl.sum(delta, 0))


@triton.jit
def form_gradients_kernel(
    q,
    k,
    v,
    grad_out,
    padding,  # uint8 (B, N), or None: tokens that are not in β
    weights,
    grad_weights,
    bound,
    partials_a,
    partials_b,
    deltas,
    grad_q,  # out
    grad_k,  # out
    grad_v,  # out
    q_b, q_h, q_n,
    k_b, k_h, k_n,
    v_b, v_h, v_n,
    g_b, g_h, g_n,
    gq_b, gq_h, gq_n,
    gk_b, gk_h, gk_n,
    gv_b, gv_h, gv_n,
    HEADS, N, steps, sum_workers,
    D: tl.constexpr, P: tl.constexpr, M: tl.constexpr, SHORT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    pair, columns = tl.program_id(0), tl.arange(0, P)
    beta = tl.load(bound + pair * D + columns, mask=columns < D, other=0.0)
    scale = inverse_scale(beta)
    unbinding = hankel(beta * scale, D, P)
    delta = sum_scalars(deltas, sum_workers, 128)
    grad_beta = sum_partials(partials_a, sum_workers, D, P) - delta * sum_partials(partials_b, sum_workers, D, P)
    grad_state = hankel(grad_beta * scale, D, P)
    for step in range(steps):
        rows = (step * tl.num_programs(1) + tl.program_id(1)) * M + tl.arange(0, M)
        queries = load_tile(q, q_b, q_h, q_n, HEADS, rows, N, D, P)
        keys = load_tile(k, k_b, k_h, k_n, HEADS, rows, N, D, P)
        short_values = load_tile(v, v_b, v_h, v_n, HEADS, rows, N, D, P)
        values = short_values.to(tl.float32)
        grads = load_tile(grad_out, g_b, g_h, g_n, HEADS, rows, N, D, P).to(tl.float32)
        weight, gamma = load_weights(weights, grad_weights, grads, values, rows, N)
        grad_keys = product(short_values, grad_state, SHORT, PRECISION)
        if padding is not None:
            ignored = is_ignored(padding, HEADS, rows, N)[:, None]
            keys = tl.where(ignored, 0.0, keys).to(k.dtype.element_ty)
            grad_keys = tl.where(ignored, 0.0, grad_keys)
        store_tile(grad_k, gk_b, gk_h, gk_n, HEADS, rows, N, grad_keys, D, P)
        retrieved = product(queries, unbinding, SHORT, PRECISION)
        inverse_v, inverse_r = inverse_norm(values), inverse_norm(retrieved)
        cosine = tl.sum(values * retrieved, 1) * inverse_v * inverse_r
        grad_cosine = weight * (gamma - delta)
        across = (grad_cosine * inverse_v * inverse_r)[:, None]
        grad_cosine = grad_cosine * cosine
        grad_values = product(keys, grad_state, SHORT, PRECISION) + weight[:, None] * grads + across * retrieved
        grad_values -= (grad_cosine * inverse_v * inverse_v)[:, None] * values
        store_tile(grad_v, gv_b, gv_h, gv_n, HEADS, rows, N, grad_values, D, P)
        grad_retrieved = across * values - (grad_cosine * inverse_r * inverse_r)[:, None] * retrieved
        grad_queries = product(grad_retrieved, unbinding, SHORT, PRECISION)
        store_tile(grad_q, gq_b, gq_h, gq_n, HEADS, rows, N, grad_queries, D, P)
