"""Softmax attention in tiles of scores that stay near the core, every head at its own size.

The CPU's fused kernel wants q, k and v of one head size: where queries and keys are much shorter than values, as in
image models, it computes with padding. Batched matrix products need none; with tiles that fit a core's cache, their
scores never travel to memory. Elsewhere tiles bound the memory that scores take.

Exponentials and logarithms are to base 2: exp2 costs half of exp on a CPU. Who calls multiplies the queries by log2(e).

Legend: S blocks, each an independent attention of M queries to N keys. A tile: some queries of some blocks, all keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)
HIDDEN = -1e30  # added to the score of a pair that is not visible; finite, so that differences are numbers
CPU_TILE_SCORES = 1 << 19  # a thread: 2 MB in float32, near enough to the core
DEVICE_TILE_SCORES = 1 << 26
NARROW = 16  # columns; products with fewer take up to a fifth of the time when computed as their transpose

Hide = Callable[[Tensor], Tensor]  # adds HIDDEN in place to the scores (S, M, N) of pairs that are not visible


class Scratch:
    """Buffers that all tiles share: fresh memory costs more than filling it."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device = device
        self.dtype = dtype
        self.buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, valid until the next call with this name."""
        size = math.prod(shape)
        if name not in self.buffers or self.buffers[name].numel() < size:
            self.buffers[name] = torch.empty(size, dtype=dtype or self.dtype, device=self.device)
        return self.buffers[name][:size].view(shape)

    def gather(self, name: str, x: Tensor, rows: Tensor) -> Tensor:
        """x[rows] for x (n, ...) and rows (S, M): (S, M, ...)."""
        out = self(name, rows.numel(), *x.shape[1:], dtype=x.dtype)
        return torch.index_select(x, 0, rows.flatten(), out=out).view(*rows.shape, *x.shape[1:])


def tile_shape(num_queries: int, num_keys: int, scratch: Scratch, max_score_bytes: int | None) -> tuple[int, int]:
    """Blocks and queries of a tile of at most `max_score_bytes`, but one query of one block at least."""
    threads = torch.get_num_threads() if scratch.device.type == "cpu" else 1
    scores = CPU_TILE_SCORES if scratch.device.type == "cpu" else DEVICE_TILE_SCORES  # a thread
    if max_score_bytes is not None:
        scores = min(scores, max_score_bytes // (scratch.dtype.itemsize * threads))
    tile_queries = min(num_queries, max(scores // num_keys, 1))
    return max(scores // (num_keys * tile_queries), 1) * threads, tile_queries


def slices(start: int, stop: int, step: int) -> Iterator[slice]:
    """Consecutive runs of `step`, the last one possibly shorter."""
    return (slice(first, min(first + step, stop)) for first in range(start, stop, step))


def tile_forward_(
    out: Tensor,
    mass: Tensor | None,
    top: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hide_: Hide | None,
    keep: Tensor | None,
    scratch: Scratch,
) -> None:
    """Writes the sums of one tile over the pairs that are visible and kept: its attention is out / mass.

    Args:
        out: (S, M, Dv), for the sum of exp2(score - top) v.
        mass: (S, M, 1), for that of exp2(score - top). None leaves it to a column of ones in v.
        top: (S, M, 1), for the largest score of a visible pair; below HIDDEN / 2 where there is none, and the sums then
            mean nothing.
        q: (S, M, D), times scale and log2(e).  k: (S, N, D).  v: (S, N, Dv).
        hide_: for pairs that are not visible.
        keep: (S, M, N), 1, or 0 for a pair that is visible but left out.
    """
    scores = _product(q, k.mT, "scores", scratch)
    if hide_ is not None:
        hide_(scores)
    torch.amax(scores, dim=-1, keepdim=True, out=top)
    weights = scores.sub_(top).exp2_()
    if keep is not None:
        weights.mul_(keep)
    if mass is not None:
        torch.sum(weights, dim=-1, keepdim=True, out=mass)
    if out.is_contiguous():
        torch.bmm(weights, v, out=out)
    else:
        out.copy_(_product(weights, v, "out", scratch))


def tile_backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hide_: Hide | None,
    keep: Tensor | None,
    grad_k: Tensor | None,
    grad_v: Tensor | None,
    scratch: Scratch,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one tile for the weights P = exp2(q kᵀ - lse) of visible, kept pairs.

    `lse` may belong to a softmax over more keys than the block's own: then the result is the block's share of the
    gradient of that softmax. With delta = rowsum(grad_out * out) - grad_lse, where grad_lse is the gradient of the
    natural log-sum-exp: dV = Pᵀ grad_out,  dS = P * (grad_out vᵀ - delta),  dQ = dS k,  dK = dSᵀ q
    (Dao et al. 2022, arXiv:2205.14135, appendix B). One column more lets the products subtract lse and delta.

    Args:
        grad_out: (S, M, Dv + 1), the last column delta.  v: (S, N, Dv + 1), the last column -1.
        q: (S, M, D + 1), times scale and log2(e), the last column lse.  k: (S, N, D + 1), the last column -1.
        hide_ and keep: as in `tile_forward_`.
        grad_k, grad_v: what other queries of these blocks gave, to be added to in place; None for the first.

    Returns:
        dQ (S, M, D), dK (S, D, N) and dV (S, Dv, N), valid until the next call. dK and dV are transposed, which makes
        faster products. Scales are the caller's: dQ lacks the factor `scale`, and dK has log2(e) too much.
    """
    weights = _product(q, k.mT, "scores", scratch)
    if hide_ is not None:
        hide_(weights)
    weights.exp2_()
    if keep is not None:
        weights.mul_(keep)
    grad_scores = _product(grad_out, v.mT, "grad_scores", scratch).mul_(weights)
    grad_v = _add_product_(grad_v, grad_out[..., :-1].mT, weights, "grad_v", scratch)
    grad_k = _add_product_(grad_k, q[..., :-1].mT, grad_scores, "grad_k", scratch)
    return _product_to_narrow(grad_scores, k[..., :-1], "grad_q", scratch), grad_k, grad_v


def _product(a: Tensor, b: Tensor, name: str, scratch: Scratch) -> Tensor:
    """a b: (S, M, K) and (S, K, N) -> (S, M, N)."""
    return torch.bmm(a, b, out=scratch(name, *a.shape[:2], b.shape[2]))


def _product_to_narrow(a: Tensor, b: Tensor, name: str, scratch: Scratch) -> Tensor:
    """The same, for results that may be narrow."""
    return (
        _product(a, b, name, scratch) if b.shape[2] >= NARROW else _product(b.mT.contiguous(), a.mT, name, scratch).mT
    )


def _add_product_(total: Tensor | None, a: Tensor, b: Tensor, name: str, scratch: Scratch) -> Tensor:
    """total + a b, in place; a b where there is no total yet."""
    return _product(a, b, name, scratch) if total is None else total.baddbmm_(a, b)
