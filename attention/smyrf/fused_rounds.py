"""The rounds of clustered attention by torch's fused kernels in both passes: CUDA, and half precision on a CPU.

The same passes as in `attention.smyrf.tiled_rounds`, a whole round in one call. Every pair counts once a round, and is
visible unless its key is masked: the kernels know no other rule.

Legend: G = B·H sequences of N tokens, as (G·N, D) rows; R rounds of S blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.fused import fused_attention, fused_attention_backward, pad_head, pad_heads
from attention.smyrf.clusters import inverse_order
from attention.smyrf.layout import Layout
from attention.smyrf.tiled_rounds import to_rows


@torch.no_grad()
def attend_forward(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> tuple[Tensor, Tensor]:
    """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv) -> out (B, H, Nq, Dv) in q's dtype and lse (B, H, Nq)."""
    q_rows, k_rows, mask = _rows_of(layout, q, k)
    padded = pad_heads(*(x.flatten(0, 2).contiguous() for x in (q, k, v)), masked=mask is not None)
    q_blocks, k_blocks, v_blocks, mask_blocks = (_Blocks(x) for x in (*padded, mask))
    accumulator = torch.promote_types(q.dtype, torch.float32)
    out = q.new_zeros(len(padded[0]), padded[2].shape[1], dtype=accumulator)
    lse = q.new_full((len(padded[0]), 1), -torch.inf, dtype=accumulator)
    unsorted = torch.empty_like(out, dtype=q.dtype)
    for q_round, k_round in zip(q_rows, k_rows, strict=True):
        round_out, round_lse = fused_attention(
            q_blocks(q_round), k_blocks(k_round), v_blocks(k_round), mask_blocks(k_round), scale
        )
        rank = inverse_order(q_round.flatten())
        torch.index_select(round_out.reshape(out.shape), 0, rank, out=unsorted)
        round_lse = round_lse.reshape(lse.shape)[rank]
        # exp(round_lse - merged lse); where neither side has seen a key, inf - inf leaves the output at zero.
        weight = torch.sigmoid(round_lse - lse).nan_to_num_(0.0)
        out.lerp_(unsorted.to(accumulator), weight)
        lse = torch.logaddexp(lse, round_lse)
    return out[:, : v.shape[3]].to(q.dtype).contiguous().view(*q.shape[:3], -1), lse.view(q.shape[:3])


@torch.no_grad()
def attend_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, layout: Layout, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; shapes as in `attend_forward`."""
    q_rows, k_rows, mask = _rows_of(layout, q, k)
    rows = [x.flatten(0, 2).contiguous() for x in (q, k, v)]
    padded = pad_heads(*rows, masked=mask is not None)
    grad_out, out = (pad_head(x.flatten(0, 2).contiguous(), padded[2].shape[1]) for x in (grad_out, out))
    grad_blocks, q_blocks, k_blocks, v_blocks, out_blocks, lse_blocks, mask_blocks = (
        _Blocks(x) for x in (grad_out, *padded, out, lse.flatten(), mask)
    )
    grads = [torch.zeros_like(x, dtype=lse.dtype) for x in rows]
    for q_round, k_round in zip(q_rows, k_rows, strict=True):
        round_grads = fused_attention_backward(
            grad_blocks(q_round),
            q_blocks(q_round),
            k_blocks(k_round),
            v_blocks(k_round),
            out_blocks(q_round),
            lse_blocks(q_round),
            mask_blocks(k_round),
            scale,
        )
        q_rank, k_rank = inverse_order(q_round.flatten()), inverse_order(k_round.flatten())
        for grad, round_grad, rank in zip(grads, round_grads, (q_rank, k_rank, k_rank), strict=True):
            grad += round_grad[..., : grad.shape[1]].flatten(0, 1).index_select(0, rank)
    return tuple(grad.to(x.dtype).view_as(x) for grad, x in zip(grads, (q, k, v), strict=True))


class _Blocks:
    """Rows in sorted order, cut into equal blocks. Rounds share one buffer: fresh memory costs more than copying."""

    def __init__(self, x: Tensor | None) -> None:
        self.x = x
        self.buffer = None if x is None else torch.empty_like(x)

    def __call__(self, rows: Tensor) -> Tensor | None:
        """rows (S, M) -> (S, M, D), valid until the next call."""
        if self.x is None:
            return None
        torch.index_select(self.x, 0, rows.flatten(), out=self.buffer)
        return self.buffer.view(*rows.shape, *self.x.shape[1:])


def _rows_of(layout: Layout, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Rows of the queries (R, S, M) and of the keys (R, S, N), and the mask (G·Nk,)."""
    q_rows, k_rows = to_rows(layout.q_index, q.shape[2]), to_rows(layout.k_index, k.shape[2])
    mask = layout.key_mask
    mask = None if mask is None else mask.repeat_interleave(k.shape[1], 0).flatten()
    return *(rows.unflatten(0, (len(layout.q_index), -1)) for rows in (q_rows, k_rows)), mask
