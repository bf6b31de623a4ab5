"""Clustered attention by Triton kernels: no gathered copy of q, k or v, and no score, ever exists in memory.

Rounds are merged where they are computed, and the backward pass takes the merged output and log-sum-exp, as in
`attention.smyrf.flash`. The kernels run on CUDA; with TRITON_INTERPRET=1 in the environment, Triton interprets them on
a CPU, slowly, for tests. Triton is imported when the first kernel runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.smyrf.clusters import inverse_order
from attention.triton_support import triton_obstacle


def supports_triton(q: Tensor, v: Tensor) -> bool:
    """Whether the kernels can run on these tensors, and compiled."""
    return q.is_cuda and _obstacle(q, v) is None


def triton_clustered_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    num_clusters: int,
    scale: float,
    key_padding_mask: Tensor | None,
    merge: str = "multiset",
    lag: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Shapes as in `clustered_attention`, with lengths that are multiples of `num_clusters`.

    Args:
        merge: "multiset": a key met in several rounds counts as often.  "union": it counts once.
        lag: query i sees the keys j <= i - lag; None: all.

    Returns:
        out (B, H, Nq, Dv) and the log-sum-exp of the scores, float32 (B, H, Nq); both carry gradients. A query that
        sees no key has out 0 and lse -inf.

    Raises:
        ValueError: there is no Triton, or it cannot run on these tensors.
    """
    if obstacle := _obstacle(q, v):
        raise ValueError(f"the triton backend {obstacle}")
    if scale <= 0:  # the kernels take the largest score before they scale it
        q, scale = q * scale, 1.0
    ids = [_cluster_ids(order, num_clusters) if merge == "union" else None for order in (q_order, k_order)]
    tensors = [x.contiguous() for x in (q, k, v, q_order, k_order)]
    mask = None if key_padding_mask is None else key_padding_mask.contiguous()
    return _forward(*tensors, *ids, mask, num_clusters, scale, lag)


def _cluster_ids(order: Tensor, num_clusters: int) -> Tensor:
    """The cluster of every token in every round: order int64 (R, B, H, N) -> int32 (R, B, H, N)."""
    return (inverse_order(order) // (order.shape[-1] // num_clusters)).int()


def _obstacle(q: Tensor, v: Tensor) -> str | None:
    """Why the kernels cannot run; head sizes are what registers and shared memory hold a block of."""
    return triton_obstacle(q, v, max_head_dim=128 if q.dtype is torch.float32 else 256, instead="einsum")


@torch.library.custom_op("smyrf::triton_forward", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    num_clusters: int,
    scale: float,
    lag: int | None,
) -> tuple[Tensor, Tensor]:
    """`triton_clustered_attention` of contiguous tensors, with a positive scale, and cluster ids for a union."""
    from attention.smyrf.triton_forward import launch_forward

    with torch.cuda.device_of(q):
        return launch_forward(q, k, v, q_order, k_order, q_ids, k_ids, key_padding_mask, num_clusters, scale, lag)


@_forward.register_fake
def _(q, k, v, *_):
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("smyrf::triton_backward", mutates_args=())
def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    q_ids: Tensor | None,
    k_ids: Tensor | None,
    key_padding_mask: Tensor | None,
    out: Tensor,
    lse: Tensor,
    num_clusters: int,
    scale: float,
    lag: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given the merged out and lse."""
    from attention.smyrf.triton_backward import launch_backward

    with torch.cuda.device_of(q):
        return launch_backward(
            grad_out.contiguous(),
            grad_lse.contiguous(),
            q,
            k,
            v,
            q_order,
            k_order,
            q_ids,
            k_ids,
            key_padding_mask,
            out,
            lse,
            num_clusters,
            scale,
            lag,
        )


@_backward.register_fake
def _(grad_out, grad_lse, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save(ctx, inputs, output) -> None:
    *tensors, ctx.num_clusters, ctx.scale, ctx.lag = inputs
    ctx.save_for_backward(*tensors, *output)


def _differentiate(ctx, grad_out, grad_lse):
    grads = _backward(grad_out, grad_lse, *ctx.saved_tensors, ctx.num_clusters, ctx.scale, ctx.lag)
    return *grads, *[None] * 8


_forward.register_autograd(_differentiate, setup_context=_save)
