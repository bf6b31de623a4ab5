"""Attention in rounds of blocks with a backward pass of its own, as operators that torch.compile takes whole.

No score matrix is kept, and none exists larger than a tile. Whole-round fused kernels do the work where they are
fastest, kernels in C on CPUs that can build them, and tiles of matrix products everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.fused import supports_fused
from attention.smyrf import fused_rounds, native, tiled_rounds
from attention.smyrf.layout import Layout


def flash_attend(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float, use_native: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ) v over the pairs of a layout; no second derivatives.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        use_native: take the kernels in C, where they know the layout's rules.

    Returns:
        out (B, H, Nq, Dv), and the log-sum-exp of the scores (B, H, Nq), float32 at least; both carry gradients. A
        query that sees no key has out 0 and lse -inf.
    """
    rules = (layout.key_mask, layout.union, layout.lag, layout.reach, layout.max_score_bytes)
    return _attend(q, k, v, layout.q_index, layout.k_index, *rules, scale, use_native)


def _uses_fused(q: Tensor, layout: Layout) -> bool:
    """Whether the fused kernels can and should do it: they know masks alone, and on a CPU tiles beat them in float32.

    Half precision on a CPU is left to them, for the processors that multiply it in hardware.
    """
    if layout.union or layout.lag is not None or layout.reach is not None or layout.max_score_bytes is not None:
        return False
    return supports_fused(q.device, q.dtype) and (q.device.type == "cuda" or q.dtype.itemsize == 2)


@torch.library.custom_op("smyrf::attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    key_mask: Tensor | None,
    union: bool,
    lag: int | None,
    reach: int | None,
    max_score_bytes: int | None,
    scale: float,
    use_native: bool,
) -> tuple[Tensor, Tensor]:
    layout = Layout(q_index, k_index, key_mask, union, lag, reach, max_score_bytes)
    if use_native and native.supports(layout):
        return native.attend_forward(q, k, v, layout, scale)
    rounds = fused_rounds if _uses_fused(q, layout) else tiled_rounds
    with torch.autocast(q.device.type, enabled=False):
        return rounds.attend_forward(q, k, v, layout, scale)


@torch.library.custom_op("smyrf::attend_backward", mutates_args=())
def _attend_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    q_index: Tensor,
    k_index: Tensor,
    key_mask: Tensor | None,
    union: bool,
    lag: int | None,
    reach: int | None,
    max_score_bytes: int | None,
    scale: float,
    use_native: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    layout = Layout(q_index, k_index, key_mask, union, lag, reach, max_score_bytes)
    if use_native and native.supports(layout):
        return native.attend_backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale)
    with torch.autocast(q.device.type, enabled=False):
        if grad_lse is None and _uses_fused(q, layout):
            return fused_rounds.attend_backward(grad_out, q, k, v, out, lse, layout, scale)
        return tiled_rounds.attend_backward(grad_out, grad_lse, q, k, v, out, lse, layout, scale)


def _arranged(like: Tensor, dim: int, use_native: bool, reach: int | None) -> Tensor:
    """An empty result as the operators return it: the kernels in C leave the tokens where those of `like` are."""
    if use_native and reach is None:
        return native.arranged(like, dim, like.new_empty)
    return like.new_empty(*like.shape[:3], dim)


@_attend.register_fake
def _(q, k, v, q_index, k_index, key_mask, union, lag, reach, max_score_bytes, scale, use_native):
    lse_dtype = torch.promote_types(q.dtype, torch.float32)
    return _arranged(q, v.shape[3], use_native, reach), q.new_empty(q.shape[:3], dtype=lse_dtype)


@_attend_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *rest):
    *_, reach, _, _, use_native = rest
    return tuple(_arranged(x, x.shape[3], use_native, reach) for x in (q, k, v))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, q_index, k_index, key_mask, *ctx.rules = inputs
    ctx.save_for_backward(q, k, v, *output, q_index, k_index, key_mask)
    ctx.set_materialize_grads(False)


def _differentiate(
    ctx: torch.autograd.function.FunctionCtx, grad_out: Tensor | None, grad_lse: Tensor | None
) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # once: under activation checkpointing the tensors come back a single time
    grad_out = torch.zeros_like(saved[3]) if grad_out is None else grad_out
    grads = _attend_backward(grad_out, grad_lse, *saved, *ctx.rules)
    return *grads, *[None] * 9


_attend.register_autograd(_differentiate, setup_context=_save)
