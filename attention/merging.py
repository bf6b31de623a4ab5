"""Softmax attention over a union of key sets, each attended to on its own and merged by log-sum-exp.

With out_p and lse_p the output and the log-sum-exp of the scores over set p, the softmax over all sets together is
Σ_p w_p out_p with w = softmax over p of lse_p (Dao et al. 2022, "FlashAttention", https://arxiv.org/abs/2205.14135,
section 3.1). The sets must not overlap: a key in two of them would count twice.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.fused import fused_heads, fused_heads_backward, pad_head, pad_heads, supports_fused


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ) v over the visible keys, and the log-sum-exp of the scores; both carry gradients.

    Where torch has a fused kernel, no score is kept; elsewhere (XLA) they are.

    Args:
        q: (S, H, M, D).  k: (S, H, N, D).  v: (S, H, N, Dv).
        visible: bool, broadcast to (S, H, M, N), True = attended to; None = all.
        log_weights: added to the scores, broadcast like `visible` and without a gradient: log c for a key that stands
            for c keys.

    Returns:
        out (S, H, M, Dv) and lse (S, H, M), float32 at least. A query that sees no key has out 0 and for lse half the
        lowest number, which weighs nothing beside any other.
    """
    bias = None if log_weights is None else log_weights.to(q.dtype)
    if visible is not None:
        hidden = torch.finfo(q.dtype).min / 2  # finite, and adding a score to it cannot overflow
        zeros = torch.zeros((), dtype=q.dtype, device=q.device) if bias is None else bias
        bias = torch.where(visible, zeros, hidden)
    if supports_fused(q.device, q.dtype):
        out, lse = _FusedAttention.apply(q, k, v, bias, scale)
    else:
        scores = (scale * q) @ k.transpose(-1, -2)
        scores = scores if bias is None else scores + bias
        lse = torch.logsumexp(scores.to(torch.promote_types(q.dtype, torch.float32)), dim=-1)
        out = (scores - lse[..., None]).exp().to(v.dtype) @ v
    if visible is not None:
        empty = ~visible.any(dim=-1)  # (S, H, M), or what broadcasts to it
        out = out.masked_fill(empty[..., None], 0.0)
        lse = lse.masked_fill(empty, torch.finfo(lse.dtype).min / 2)
    return out, lse


def merge(*parts: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Merges (out (..., M, Dv), lse (..., M)) of disjoint key sets into those of all their keys together."""
    lses = torch.stack([lse for _, lse in parts])  # (P, ..., M)
    weights = torch.softmax(lses, dim=0).unsqueeze(-1)
    out = sum(weight.to(out.dtype) * out for weight, (out, _) in zip(weights, parts, strict=True))
    return out, torch.logsumexp(lses, dim=0)


class _FusedAttention(torch.autograd.Function):
    """q (S, H, M, D), k (S, H, N, D), v (S, H, N, Dv), bias broadcast to (S, H, M, N) -> out (S, H, M, Dv), lse."""

    @staticmethod
    def forward(ctx, q, k, v, bias, scale):
        padded = pad_heads(q, k, v, masked=bias is not None)
        out, lse = fused_heads(*padded, bias, scale)
        out = out[..., : v.shape[-1]]
        ctx.save_for_backward(q, k, v, bias, out, lse)
        ctx.scale = scale
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out, grad_lse):
        """dS = P * (grad_out vᵀ - delta + grad_lse), delta = rowsum(grad_out * out).

        The kernel makes delta from grad_out and out. One more coordinate, 1 in grad_out, -grad_lse in out and 0 in v,
        gives it delta - grad_lse and leaves grad_out vᵀ alone; that coordinate of the gradient of v is dropped.
        """
        q, k, v, bias, out, lse = ctx.saved_tensors
        value_dim = v.shape[-1]
        out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], dim=-1)
        grad_out = torch.cat([grad_out, torch.ones_like(grad_out[..., :1])], dim=-1)
        q_pad, k_pad, v_pad = pad_heads(q, k, pad_head(v, value_dim + 1), masked=bias is not None)
        out, grad_out = (pad_head(x, v_pad.shape[-1]) for x in (out, grad_out))
        grads = fused_heads_backward(grad_out, q_pad, k_pad, v_pad, out, lse, bias, ctx.scale)
        return *(grad[..., : x.shape[-1]] for grad, x in zip(grads, (q, k, v), strict=True)), None, None
