"""The rounds of clustered attention by the kernels of `native.c`: on a CPU, computing in float32.

As `attention.smyrf.tiled_rounds`, with as much kept for the backward pass, and nothing gathered beside what a core's
cache holds. The number of threads changes no result but the rounding of dQ.

Legend: S blocks a round of M queries and N keys.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from attention.huge_pages import new_result
from attention.native_support import load_kernels, scratch_memory
from attention.smyrf.layout import Layout

CHUNK = 128  # keys that a kernel takes at a time: KEYS in native.c
POINTERS = (
    *("q", "k", "v", "q_index", "k_index", "key_mask", "q_blocks", "k_blocks", "out", "lse", "mass"),
    *("grad_out", "grad_lse", "shift", "delta", "grad_q", "grad_k", "grad_v", "scratch"),
)
NUMBERS = (
    *("batch", "heads", "num_queries", "num_keys", "key_dim", "value_dim"),
    *("rounds", "blocks", "block_queries", "block_keys", "lag", "key_parts", "threads"),
)
STRIDED = ("q", "k", "v", "out", "grad_out", "grad_q", "grad_k", "grad_v")


class _Problem(ctypes.Structure):
    """`Problem` in native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        *((f"{name}_strides", ctypes.c_int64 * 3) for name in STRIDED),
        ("scale", ctypes.c_float),
    ]


def supports(layout: Layout) -> bool:
    """Whether the kernels know its rules: every key is in one block of a round."""
    return layout.reach is None


def attend_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv) -> out (B, H, Nq, Dv) in q's dtype and lse (B, H, Nq).

    Tokens of out lie in memory as those of q do.
    """
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = arranged(q, v.shape[3], partial(new_result, lse))
    _run("smyrf_forward", q, k, v, layout, scale, out=out, lse=lse, mass=torch.empty_like(lse))
    return out.to(q.dtype), lse


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
    """Gradients of q, k and v, in memory as these are; shapes as in `attend_forward`."""
    parts = _key_parts(layout)
    grads_q = arranged(q, q.shape[3], partial(new_result, lse), parts)
    grad_q, others = grads_q[: len(q)], grads_q[len(q) :]
    grad_k, grad_v = (arranged(x, x.shape[3], partial(new_result, lse)) for x in (k, v))
    results = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    results |= {"shift": torch.empty_like(lse), "delta": torch.empty_like(lse)}
    given = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse}
    _run("smyrf_backward", q, k, v, layout, scale, key_parts=parts, **given, **results)
    if parts > 1:
        grad_q += others.unflatten(0, (parts - 1, len(q))).sum(0)
    return tuple(grad.to(x.dtype) for grad, x in zip((grad_q, grad_k, grad_v), (q, k, v), strict=True))


def arranged(like: Tensor, dim: int, new: Callable[..., Tensor], copies: int = 1) -> Tensor:
    """A new (copies·B, H, N, dim) for `like` (B, H, N, ..): its tokens are (.., N, H, dim) in memory if those are."""
    batch, heads, tokens, _ = like.shape
    if like.is_contiguous() or not like.transpose(1, 2).is_contiguous():
        return new(copies * batch, heads, tokens, dim)
    return new(copies * batch, tokens, heads, dim).transpose(1, 2)


def _key_parts(layout: Layout) -> int:
    """Into how many runs of whole chunks a block's keys go, for all threads to have work where blocks are few."""
    blocks, threads = layout.k_index[0, ..., 0].numel(), torch.get_num_threads()
    chunks = -(-layout.k_index.shape[-1] // CHUNK)
    if blocks % threads == 0 or blocks > 4 * threads:
        return 1
    chunks_each = -(-chunks // min(-(-4 * threads // blocks), chunks))
    return -(-chunks // chunks_each)


def _run(
    kernel: str, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, key_parts: int = 1, **tensors: Tensor
) -> None:
    """Calls a kernel, which writes into those of the tensors that are its results."""
    kernels = load_kernels("smyrf")
    rounds, batch, heads, num_blocks, block_queries = layout.q_index.shape
    threads = torch.get_num_threads()
    kernels.smyrf_scratch.restype = ctypes.c_int64
    scratch = kernels.smyrf_scratch(*map(ctypes.c_int64, (q.shape[3], v.shape[3], rounds)))
    tensors |= {"q": q, "k": k, "v": v, "q_index": layout.q_index, "k_index": layout.k_index}
    tensors |= {"key_mask": layout.key_mask, "scratch": scratch_memory(threads * scratch)}
    if layout.union and rounds > 1:
        for name, x in (("q_blocks", q), ("k_blocks", k)):
            tensors[name] = x.new_empty(rounds, *x.shape[:3], dtype=torch.int32)
    tensors = {name: _readable(name, x) for name, x in tensors.items() if x is not None}
    problem = _Problem(
        **{name: x.data_ptr() for name, x in tensors.items()},
        **{f"{name}_strides": tensors[name].stride()[:3] for name in STRIDED if name in tensors},
        batch=batch,
        heads=heads,
        num_queries=q.shape[2],
        num_keys=k.shape[2],
        key_dim=q.shape[3],
        value_dim=v.shape[3],
        rounds=rounds,
        blocks=batch * heads * num_blocks,
        block_queries=block_queries,
        block_keys=layout.k_index.shape[4],
        lag=-1 if layout.lag is None else layout.lag,
        key_parts=key_parts,
        threads=threads,
        scale=scale,
    )
    getattr(kernels, kernel)(ctypes.byref(problem))


def _readable(name: str, x: Tensor) -> Tensor:
    """As the kernels read it: in float32 what is half precision, and contiguous, but for what they have strides of."""
    x = x.float() if x.is_floating_point() else x
    return x if name in STRIDED and x.stride(-1) == 1 else x.contiguous()
