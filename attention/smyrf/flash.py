"""Clustered attention by fused block kernels in both passes; no score matrix ever exists.

Forward: every round runs the fused forward in its clusters and is merged into the running output by log-sum-exp.
Backward: with the merged output O and log-sum-exp L of a query, every round's weights are exp(s - L), so the fused
backward of each cluster, given the *merged* O and L, yields that cluster's share of the gradient, and shares add up.
(`attention.tiled` stands in for the fused backward where its padding would cost more than it saves.)
What is kept between the passes is the inputs, the orders, O and L: linear in the length, like one dense flash call.

Legend: G = B·H sequences of N tokens, as (G·N, D) rows; L clusters of C tokens each; R rounds.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from attention.fused import fused_attention, fused_attention_backward, pad_head, pad_heads
from attention.smyrf.clusters import inverse_order
from attention.tiled import prefers_tiles, tiled_attention_backward


@torch.compiler.disable  # the kernels are compiled already; traced piece by piece they ran ten times slower
def flash_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    num_clusters: int,
    scale: float,
    key_padding_mask: Tensor | None,
) -> Tensor:
    """Shapes as in `clustered_attention`, with lengths that are multiples of `num_clusters`."""
    num_blocks = q.shape[0] * q.shape[1] * num_clusters  # G·L
    mask = None if key_padding_mask is None else key_padding_mask[:, None].expand(k.shape[:3]).reshape(-1)
    q_rows, k_rows, v_rows = (x.flatten(0, 2).contiguous() for x in (q, k, v))
    out = _FlashClusters.apply(q_rows, k_rows, v_rows, mask, _to_rows(q_order), _to_rows(k_order), num_blocks, scale)
    return out.view(*q.shape[:3], v.shape[-1])


class _FlashClusters(torch.autograd.Function):
    """q (G·Nq, D), k (G·Nk, D), v (G·Nk, Dv), mask (G·Nk,), q_rows (R, G·Nq), k_rows (R, G·Nk) -> (G·Nq, Dv)."""

    @staticmethod
    def forward(ctx, q, k, v, mask, q_rows, k_rows, num_blocks, scale):
        padded = pad_heads(q, k, v, masked=mask is not None)
        q_blocks, k_blocks, v_blocks, mask_blocks = (_Blocks(x, num_blocks) for x in (*padded, mask))
        accumulator = torch.promote_types(q.dtype, torch.float32)
        out = q.new_zeros(padded[0].shape[0], padded[2].shape[1], dtype=accumulator)
        lse = q.new_full((q.shape[0], 1), -torch.inf, dtype=accumulator)
        unsorted = torch.empty_like(out, dtype=q.dtype)
        for q_round, k_round in zip(q_rows, k_rows, strict=True):
            round_out, round_lse = fused_attention(
                q_blocks(q_round), k_blocks(k_round), v_blocks(k_round), mask_blocks(k_round), scale
            )
            rank = inverse_order(q_round)
            torch.index_select(round_out.reshape(out.shape), 0, rank, out=unsorted)
            round_lse = round_lse.reshape(lse.shape)[rank]
            # exp(round_lse - merged lse); where neither side has seen a key, inf - inf leaves the output at zero.
            weight = torch.sigmoid(round_lse - lse).nan_to_num_(0.0)
            out.lerp_(unsorted.to(accumulator), weight)
            lse = torch.logaddexp(lse, round_lse)
        out = out[:, : v.shape[1]].to(q.dtype)
        ctx.save_for_backward(q, k, v, mask, q_rows, k_rows, out, lse)
        ctx.num_blocks, ctx.scale = num_blocks, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        q, k, v, mask, q_rows, k_rows, out, lse = ctx.saved_tensors
        grad_out = grad_out.contiguous()
        if prefers_tiles(q, v):
            block_backward = tiled_attention_backward
            tensors = (grad_out, q, k, v, (grad_out * out).sum(dim=1))
        else:
            block_backward = fused_attention_backward
            padded = pad_heads(q, k, v, masked=mask is not None)
            grad_out, out = (pad_head(x, padded[2].shape[1]) for x in (grad_out, out))
            tensors = (grad_out, *padded, out)
        grad_blocks, q_blocks, k_blocks, v_blocks, out_blocks, lse_blocks, mask_blocks = (
            _Blocks(x, ctx.num_blocks) for x in (*tensors, lse.squeeze(1), mask)
        )
        grads = [torch.zeros_like(x, dtype=lse.dtype) for x in (q, k, v)]
        for q_round, k_round in zip(q_rows, k_rows, strict=True):
            round_grads = block_backward(
                grad_blocks(q_round),
                q_blocks(q_round),
                k_blocks(k_round),
                v_blocks(k_round),
                out_blocks(q_round),
                lse_blocks(q_round),
                mask_blocks(k_round),
                ctx.scale,
            )
            q_rank, k_rank = inverse_order(q_round), inverse_order(k_round)
            for grad, round_grad, rank in zip(grads, round_grads, (q_rank, k_rank, k_rank), strict=True):
                rows = round_grad[..., : grad.shape[1]].flatten(0, 1)
                grad += rows.index_select(0, rank)
        return *(grad.to(q.dtype) for grad in grads), None, None, None, None, None


class _Blocks:
    """Rows in sorted order, cut into equal blocks. Rounds share one buffer: fresh memory costs more than copying."""

    def __init__(self, x: Tensor | None, num_blocks: int) -> None:
        self.x = x
        self.num_blocks = num_blocks
        self.buffer = None if x is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def __call__(self, rows: Tensor) -> Tensor | None:
        """rows (G·N,) -> (G·L, C, D), valid until the next call."""
        if self.x is None:
            return None
        torch.index_select(self.x, 0, rows, out=self.buffer)
        return self.buffer.view(self.num_blocks, -1, *self.x.shape[1:])


def _to_rows(order: Tensor) -> Tensor:
    """Indices of tokens within their sequence (R, B, H, N) -> indices of rows among all sequences (R, G·N)."""
    order = order.flatten(1, 2)  # (R, G, N)
    first_row = torch.arange(order.shape[1], device=order.device)[:, None] * order.shape[2]
    return (order + first_row).flatten(1)
