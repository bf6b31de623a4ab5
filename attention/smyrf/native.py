"""The rounds of clustered attention by the kernels of `native.c`: on a CPU, computing in float32.

As `attention.smyrf.tiled_rounds`, with as much kept for the backward pass, and nothing gathered beside what a core's
cache holds. The number of threads changes no result but the rounding of dQ.

Legend: S blocks a round of M queries and N keys.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.huge_pages import new_result
from attention.native_support import load_kernels
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


class _Problem(ctypes.Structure):
    """`Problem` in native.c, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in POINTERS),
        *((name, ctypes.c_int64) for name in NUMBERS),
        ("scale", ctypes.c_float),
    ]


def supports(layout: Layout) -> bool:
    """Whether the kernels know its rules: every key is in one block of a round."""
    return layout.reach is None


def attend_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv) -> out (B, H, Nq, Dv) in q's dtype and lse (B, H, Nq)."""
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    out = new_result(lse, *lse.shape, v.shape[3])
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
    """Gradients of q, k and v; shapes as in `attend_forward`."""
    parts = _key_parts(layout)
    grad_q, grad_k, grad_v = (new_result(lse, *shape) for shape in ((parts, *q.shape), k.shape, v.shape))
    results = {"grad_q": grad_q, "grad_k": grad_k, "grad_v": grad_v}
    results |= {"shift": torch.empty_like(lse), "delta": torch.empty_like(lse)}
    given = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse}
    _run("smyrf_backward", q, k, v, layout, scale, key_parts=parts, **given, **results)
    grads = grad_q[0] if parts == 1 else grad_q.sum(0), grad_k, grad_v
    return tuple(grad.to(x.dtype) for grad, x in zip(grads, (q, k, v), strict=True))


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
    tensors |= {"key_mask": layout.key_mask, "scratch": torch.empty(threads * scratch, dtype=torch.float32)}
    if layout.union and rounds > 1:
        for name, x in (("q_blocks", q), ("k_blocks", k)):
            tensors[name] = torch.empty(rounds, *x.shape[:3], dtype=torch.int32)
    tensors = {name: _readable(x) for name, x in tensors.items() if x is not None}
    problem = _Problem(
        **{name: x.data_ptr() for name, x in tensors.items()},
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


def _readable(x: Tensor) -> Tensor:
    """As the kernels read it: contiguous, in float32 what is half precision."""
    return (x.float() if x.is_floating_point() else x).contiguous()
