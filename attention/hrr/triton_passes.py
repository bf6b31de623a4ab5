"""HRR attention by Triton kernels: three passes over the tokens forward, two backward.

Forward, a tensor of the inputs' size is moved six times: `bind_kernel` reads k and v, `compare_kernel` q and v,
`weigh_kernel` reads v and writes the output. Four is the least (q, k, v, out); of the two extra readings of v the cache
serves what it can hold, which is why each pass starts where the one before it ended. Backward it is ten times, of at
least seven: `sum_gradients_kernel` reads q, v and the output's gradient, `form_gradients_kernel` these and k, and
writes three gradients. Between the passes stay the inputs, the weights and β.

Products are more precise than the inputs: with inputs of 16 bits, float32 factors are split into two numbers of 16
bits; with float32 inputs, tensor cores add up three products in TF32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from attention.hrr.triton_gradients import form_gradients_kernel, sum_gradients_kernel
from attention.hrr.triton_kernels import bind_kernel, compare_kernel, weigh_kernel

PROGRAMS = 2  # a multiprocessor: partial sums stay few, and loads enough are in flight
TILE = 8192  # numbers of v that a program of `weigh_kernel` takes
SHORT_FORWARD = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
SHORT_BACKWARD = {torch.bfloat16: tl.bfloat16, torch.float16: tl.bfloat16}  # whose range holds any gradient


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, mask_superposition: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), weights (B, H, N) and superposition β (B, H, D), float32; arguments as in `hrr_attention`.

    The rows of q, k and v must be contiguous.
    """
    batch, heads, tokens, dim = q.shape
    padding = _as_bytes(key_padding_mask)
    short = SHORT_FORWARD.get(q.dtype)
    options = _options(q, short, stages=3)
    grid, steps = _grid(q, options["M"])
    workers = grid[1]
    out = torch.empty_like(v)
    float32 = {"dtype": torch.float32, "device": q.device}
    weights, totals, bound = (torch.empty(batch, heads, size, **float32) for size in (tokens, workers, dim))
    partials = torch.empty(workers, batch, heads, dim, **float32)
    with torch.cuda.device_of(q):
        bind_kernel[grid](
            k, v, padding if mask_superposition else None, partials, *_strides(k, v), heads, tokens, steps,
            **options,
        )  # fmt: skip
        compare_kernel[grid](
            q, v, padding, partials, bound, weights, totals, *_strides(q, v), heads, tokens, steps, workers,
            SHORT=short, **options,
        )  # fmt: skip
        tile = max(1, TILE // options["P"])
        weigh_kernel[(grid[0], triton.cdiv(tokens, tile))](
            v, weights, totals, out, *_strides(v, out), heads, tokens, workers,
            D=dim, P=options["P"], M=tile, EMPTY_IS_UNIFORM=padding is not None and not mask_superposition, num_warps=8,
        )  # fmt: skip
    return out, weights, bound


def backward(
    grad_out: Tensor,
    grad_weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    weights: Tensor,
    bound: Tensor,
    mask_superposition: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given those of out (B, H, N, D) and of weights (B, H, N)."""
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    batch, heads, tokens, dim = q.shape
    padding = _as_bytes(key_padding_mask) if mask_superposition else None
    short = SHORT_BACKWARD.get(q.dtype)
    options = _options(q, short, stages=2)
    grid, steps = _grid(q, options["M"])
    workers = grid[1]
    float32 = {"dtype": torch.float32, "device": q.device}
    partials_a, partials_b = torch.empty(2, workers, batch, heads, dim, **float32)
    deltas = torch.empty(batch, heads, workers, **float32)
    grad_weights = grad_weights.contiguous()
    grad_out = grad_out if grad_out.stride(-1) == 1 else grad_out.contiguous()
    with torch.cuda.device_of(q):
        sum_gradients_kernel[grid](
            q, v, grad_out, weights, grad_weights, bound, partials_a, partials_b, deltas,
            *_strides(q, v, grad_out), heads, tokens, steps,
            SHORT=short, **options,
        )  # fmt: skip
        form_gradients_kernel[grid](
            q, k, v, grad_out, padding, weights, grad_weights, bound, partials_a, partials_b, deltas,
            grad_q, grad_k, grad_v, *_strides(q, k, v, grad_out, grad_q, grad_k, grad_v), heads, tokens, steps, workers,
            SHORT=short, **options,
        )  # fmt: skip
    return grad_q, grad_k, grad_v


def _options(q: Tensor, short: tl.dtype | None, stages: int) -> dict[str, object]:
    """Constants of the kernels, and how to compile for them; `short` is what float32 factors are split into."""
    padded = max(16, triton.next_power_of_2(q.shape[-1]))
    wide = padded > 64
    return {
        "D": q.shape[-1],
        "P": padded,
        "M": 64 if short and not wide else 32,
        "PRECISION": "ieee" if torch.version.hip else "tf32x3",
        "num_warps": 8,
        "num_stages": 1 if wide else stages,
    }


def _grid(q: Tensor, tile: int) -> tuple[tuple[int, int], int]:
    """Pairs of batch row and head, workers of each pair, and the steps each worker takes."""
    pairs = q.shape[0] * q.shape[1]
    processors = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 1
    tiles = triton.cdiv(q.shape[2], tile)
    workers = max(1, min(tiles, triton.cdiv(PROGRAMS * processors, pairs)))
    return (pairs, workers), triton.cdiv(tiles, workers)


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)
