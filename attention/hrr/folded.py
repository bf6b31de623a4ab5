"""The HRR self-attention layer as one function of x that forms neither queries nor keys; for CPUs.

Keys enter only through the state of each head, S = Σ_t k_t v_tᵀ = Wk G Wvᵀ with the Gram matrix G = Σ_t x_t x_tᵀ, and
queries only through what they retrieve, r = q M = x (M Wq)ᵀ: the projection by Wq and the unbinding by M (`hankel` of
β) are one linear map. That leaves v, r, the output and G, which is symmetric: 3.6 N C² multiply-adds, where q, k, v,
the output, S and q M take 4 N C² + 2 N C D, and as many tensors of x's size.

Backward, with u = (dr, dv) the gradients of r and v: dWr = drᵀ x, dWv = dvᵀ x, dx = dr Wr + dv Wv + x (dG + dGᵀ). The
sum δ over tokens that the softmax needs comes from the gradient of the output's weights, δ_h = Σ dWo ∘ Wo over the
head's columns. Kept between the passes are x, one weight for each token and head, and G; v and r are computed again,
or kept too, for at most a tenth less time and three times the memory.

It wins where sequences are long against the channels: products of C x C matrices grow with C³.

Here stands what is done with matrices; the passes over the tokens are those of `native`, or of `folded_passes`.

Legend: C channels of x, plus a constant 1 where the projections have a bias (it is their last column then); E = H·D
channels of q, k and v; one batch row of N tokens at a time.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from attention.hrr import folded_passes, native
from attention.hrr.chunked import normalize_
from attention.hrr.ops import hankel, sum_of_bindings


def forward(
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
    """The layer without the output's bias.

    Args:
        x: (B, N, E).  wq, wk, wv: (E, C), C = E, or E + 1 with the bias as last column.  wo: (E, E).
        key_padding_mask: bool (B, N), True = ignored.
        recompute: keep neither v nor r for the backward pass.

    Returns:
        out (B, N, E), weights (B, H, N), G (B, C, C), and v and r (2, B, N, E), or (2, B, 0, E) if recomputed.
    """
    batch, tokens, dim = x.shape
    passes = _passes_for(x)
    out = x.new_empty(x.shape)
    weights = x.new_empty(batch, num_heads, tokens)
    gram = x.new_empty(batch, wq.shape[1], wq.shape[1])
    kept = x.new_empty(2, batch, 0 if recompute else tokens, dim)
    for b in range(batch):
        mask = None if key_padding_mask is None else key_padding_mask[b]  # (N,)
        gram[b] = passes.gram(x[b], wq.shape[1], mask if mask_superposition else None)
        wr = _retrieval(wq, _unbinding(wk @ gram[b], wv, num_heads))  # (E, C)
        values, retrieved = (out[b], None) if recompute else kept[:, b]  # (N, E)
        passes.retrieve(x[b], wv, wr, weights[b], values, retrieved)
        normalize_(weights[b], mask, mask_superposition)
        passes.project(values, weights[b], wo, out[b])
    return out, weights, gram, kept


def backward(
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
    """Gradients of x, wq, wk, wv and wo, given that of out."""
    dim, heads = x.shape[2], weights.shape[1]
    passes = _passes_for(x)
    recompute = kept.shape[2] == 0
    grad_x = x.new_empty(x.shape)
    totals = None
    for b in range(len(x)):
        mask = None if key_padding_mask is None or not mask_superposition else key_padding_mask[b]  # (N,)
        values, retrieved = (grad_x[b], None) if recompute else kept[:, b]  # (N, E); grad_x is written later
        grad_wo = passes.project_gradient(grad_out[b], x[b], wv, weights[b], values, known=not recompute)
        delta = (grad_wo * wo).sum(0).unflatten(0, (heads, -1)).sum(-1)  # (H,)
        keys_gram = wk @ gram[b]  # (E, C)
        unbinding = _unbinding(keys_gram, wv, heads)  # (H, D, D)
        wr = _retrieval(wq, unbinding)
        grad_wr, grad_wv = passes.retrieve_gradient(
            grad_out[b], x[b], wv, wr, wo, weights[b], delta, values, retrieved, grad_x[b]
        )
        grad_wr_h, wq_h, wk_h, wv_h = (w.unflatten(0, (heads, -1)) for w in (grad_wr, wq, wk, wv))  # (H, D, C)
        grad_wq = (unbinding @ grad_wr_h).flatten(0, 1)
        grad_state = hankel(sum_of_bindings(grad_wr_h @ wq_h.mT))  # (H, D, D)
        bound_values = (grad_state @ wv_h).flatten(0, 1)  # (E, C)
        grad_wk = bound_values @ gram[b]
        grad_wv += (grad_state @ keys_gram.unflatten(0, (heads, -1))).flatten(0, 1)
        grad_gram = wk.T @ bound_values
        passes.add_product(x[b], mask, (grad_gram + grad_gram.T)[:, :dim], grad_x[b])
        grads = grad_wq, grad_wk, grad_wv, grad_wo
        totals = grads if totals is None else [total.add_(grad) for total, grad in zip(totals, grads, strict=True)]
    totals = map(torch.zeros_like, (wq, wk, wv, wo)) if totals is None else totals
    return grad_x, *totals


def _passes_for(x: Tensor) -> ModuleType:
    return native if native.supports(x) else folded_passes


def _unbinding(keys_gram: Tensor, wv: Tensor, num_heads: int) -> Tensor:
    """M (H, D, D) of every head from Wk G (E, C): S = Wk G Wvᵀ, and β its anti-diagonal sums."""
    state = keys_gram.unflatten(0, (num_heads, -1)) @ wv.unflatten(0, (num_heads, -1)).mT
    return hankel(sum_of_bindings(state))


def _retrieval(wq: Tensor, unbinding: Tensor) -> Tensor:
    """The projection Wr (E, C) with x Wrᵀ = q M."""
    return (unbinding @ wq.unflatten(0, (len(unbinding), -1))).flatten(0, 1)
