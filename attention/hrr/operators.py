"""HRR attention and its folded layer as operators of `torch.library`: opaque to torch.compile, differentiable once.

For gradients of gradients, and for devices that have neither of the two backends, there is the plain expression.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attention.hrr import chunked, folded


def _implementation(backend: str) -> ModuleType:
    if backend == "triton":
        from attention.hrr import triton_passes  # imports triton

        return triton_passes
    return chunked


@torch.library.custom_op("hrr::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, mask_superposition: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), weights (B, H, N) and superposition (B, H, D); the first two carry gradients."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).forward(q, k, v, key_padding_mask, mask_superposition)


@attention.register_fake
def _(q, k, v, *_):
    dtype = torch.promote_types(q.dtype, torch.float32)
    return (
        torch.empty_like(v),
        q.new_empty(q.shape[:3], dtype=dtype),
        q.new_empty(*q.shape[:2], q.shape[3], dtype=dtype),
    )


@torch.library.custom_op("hrr::attention_backward", mutates_args=())
def _attention_backward(
    grad_out: Tensor,
    grad_weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    weights: Tensor,
    bound: Tensor,
    mask_superposition: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    with torch.autocast(q.device.type, enabled=False):
        return _implementation(backend).backward(
            grad_out, grad_weights, q, k, v, key_padding_mask, weights, bound, mask_superposition
        )


@_attention_backward.register_fake
def _(grad_out, grad_weights, q, k, v, *_):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_attention(ctx, inputs, output) -> None:
    q, k, v, mask, ctx.mask_superposition, ctx.backend = inputs
    _, weights, bound = output
    ctx.save_for_backward(q, k, v, mask, weights, bound)


def _differentiate_attention(ctx, grad_out, grad_weights, _):
    grads = _attention_backward(grad_out, grad_weights, *ctx.saved_tensors, ctx.mask_superposition, ctx.backend)
    return *grads, None, None, None


attention.register_autograd(_differentiate_attention, setup_context=_save_attention)


@torch.library.custom_op("hrr::layer", mutates_args=())
def layer(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    key_padding_mask: Tensor | None,
    num_heads: int,
    mask_superposition: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`folded.forward`; only its first result carries gradients."""
    return folded.forward(x, wq, wk, wv, wo, key_padding_mask, num_heads, mask_superposition, recompute)


@layer.register_fake
def _(x, wq, wk, wv, wo, key_padding_mask, num_heads, mask_superposition, recompute):
    (batch, tokens, dim), channels = x.shape, wq.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(batch, num_heads, tokens),
        x.new_empty(batch, channels, channels),
        x.new_empty(2, batch, 0 if recompute else tokens, dim),
    )


@torch.library.custom_op("hrr::layer_backward", mutates_args=())
def _layer_backward(
    grad_out: Tensor,
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    key_padding_mask: Tensor | None,
    weights: Tensor,
    gram: Tensor,
    kept: Tensor,
    mask_superposition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, wq, wk, wv and wo."""
    return folded.backward(grad_out, x, wq, wk, wv, wo, key_padding_mask, weights, gram, kept, mask_superposition)


@_layer_backward.register_fake
def _(grad_out, x, wq, wk, wv, wo, *_):
    return x.new_empty(x.shape), *(torch.empty_like(weight) for weight in (wq, wk, wv, wo))


def _save_layer(ctx, inputs, output) -> None:
    *tensors, _, ctx.mask_superposition, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)  # they would be zeros of the size of what is kept


def _differentiate_layer(ctx, grad_out, *_):
    if grad_out is None:
        return (None,) * 9
    return *_layer_backward(grad_out, *ctx.saved_tensors, ctx.mask_superposition), *[None] * 4


layer.register_autograd(_differentiate_layer, setup_context=_save_layer)
