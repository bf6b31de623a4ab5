"""The HRR self-attention layer as one function of x that forms neither queries nor keys; for CPUs.

Keys enter only through the state of each head, S = Σ_t k_t v_tᵀ = Wk G Wvᵀ with the Gram matrix G = Σ_t x_t x_tᵀ, and
queries only through what they retrieve, r = q M = x (M Wq)ᵀ: the projection by Wq and the unbinding by M (`hankel` of
β) are one linear map. That leaves v, r, the output and G, which is symmetric: 3.6 N C² multiply-adds, where q, k, v,
the output, S and q M take 4 N C² + 2 N C D, and as many tensors of x's size.

Backward, with u = (dr, dv) the gradients of r and v: dWr = drᵀ x, dWv = dvᵀ x, dx = dr Wr + dv Wv + x (dG + dGᵀ). The
sum δ over tokens that the softmax needs comes from the gradient of the output's weights, δ_h = Σ dWo ∘ Wo over the
head's columns. Kept between the passes are x, one weight for each token and head, and G; v and r are computed again,
or kept too, for at most a seventh less time and three times the memory.

It wins where sequences are long against the channels: products of C x C matrices grow with C³.

Legend: C channels of x, plus a constant 1 where the projections have a bias (it is their last column then); E = H·D
channels of q, k and v; one batch row at a time, in chunks of n tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.hrr.chunked import normalize_, token_slices
from attention.hrr.cosine import add_cosine_gradient, cosine
from attention.hrr.ops import hankel, sum_of_bindings

GRAM_BLOCK = 64  # rows of G at a time, each from the diagonal on; narrower products run slower than they save


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
    parts = token_slices(tokens, dim, x.device)
    out = torch.empty_like(x)
    weights = x.new_empty(batch, num_heads, tokens)
    gram = x.new_zeros(batch, wq.shape[1], wq.shape[1])
    kept = x.new_empty(2, batch, 0 if recompute else tokens, dim)
    scratch = x.new_empty(parts[0].stop, dim)
    for b in range(batch):
        mask = None if key_padding_mask is None else key_padding_mask[b]  # (N,)
        for t in parts:
            _add_gram(gram[b], _tokens(x[b], t, wq, mask if mask_superposition else None))
        gram[b].copy_(gram[b].triu() + gram[b].triu(1).T)
        wr = _retrieval(wq, _unbinding(wk @ gram[b], wv, num_heads))  # (E, C)
        values_row = out[b] if recompute else kept[0, b]  # (N, E)
        for t in parts:
            chunk = _tokens(x[b], t, wq)  # (n, C)
            values = torch.mm(chunk, wv.T, out=values_row[t])
            retrieved = torch.mm(chunk, wr.T, out=scratch[: len(chunk)] if recompute else kept[1, b, t])
            cosines = cosine(*(y.unflatten(1, (num_heads, -1)) for y in (values, retrieved)))  # (n, H)
            torch.exp(cosines.T, out=weights[b, :, t])
        normalize_(weights[b], mask, mask_superposition)
        for t in parts:
            weighted = scratch[: t.stop - t.start]
            _weigh(values_row[t], weights[b, :, t], weighted)
            torch.mm(weighted, wo.T, out=out[b, t])
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
    batch, tokens, dim = x.shape
    heads = weights.shape[1]
    recompute = kept.shape[2] == 0
    parts = token_slices(tokens, dim, x.device)
    grad_x = torch.empty_like(x)
    grad_wq, grad_wk, grad_wv, grad_wo = (torch.zeros_like(w) for w in (wq, wk, wv, wo))
    scratch = x.new_empty(3, parts[0].stop, dim)
    for b in range(batch):
        mask = None if key_padding_mask is None or not mask_superposition else key_padding_mask[b]  # (N,)
        grad_wo_row = torch.zeros_like(wo)
        values_row = grad_x[b] if recompute else kept[0, b]  # (N, E); grad_x is written later
        for t in parts:
            if recompute:
                torch.mm(_tokens(x[b], t, wq), wv.T, out=values_row[t])
            weighted = scratch[0, : t.stop - t.start]
            _weigh(values_row[t], weights[b, :, t], weighted)
            grad_wo_row.addmm_(grad_out[b, t].T, weighted)
        grad_wo += grad_wo_row
        delta = (grad_wo_row * wo).sum(0).unflatten(0, (heads, -1)).sum(-1)  # (H,)
        keys_gram = wk @ gram[b]  # (E, C)
        unbinding = _unbinding(keys_gram, wv, heads)  # (H, D, D)
        wr = _retrieval(wq, unbinding)
        grad_wr = torch.zeros_like(wq)
        for t in parts:
            chunk, values = _tokens(x[b], t, wq), values_row[t]  # (n, C), (n, E)
            scratch_r, dv, dr = scratch[:, : len(values)]
            retrieved = torch.mm(chunk, wr.T, out=scratch_r) if recompute else kept[1, b, t]
            torch.mm(grad_out[b, t], wo, out=dv)
            values_h, retrieved_h, dv_h, dr_h = (y.unflatten(1, (heads, -1)) for y in (values, retrieved, dv, dr))
            weight = weights[b, :, t].T  # (n, H)
            grad_cosine = (torch.mul(values_h, dv_h, out=dr_h).sum(-1) - delta) * weight
            dv_h.mul_(weight[..., None])
            add_cosine_gradient(grad_cosine, values_h, retrieved_h, dv_h, dr_h)
            grad_wr.addmm_(dr.T, chunk)
            grad_wv.addmm_(dv.T, chunk)
            torch.mm(dr, wr[:, :dim], out=grad_x[b, t]).addmm_(dv, wv[:, :dim])
        grad_wr_h, wq_h, wk_h, wv_h = (w.unflatten(0, (heads, -1)) for w in (grad_wr, wq, wk, wv))  # (H, D, C)
        grad_wq += (unbinding @ grad_wr_h).flatten(0, 1)
        grad_state = hankel(sum_of_bindings(grad_wr_h @ wq_h.mT))  # (H, D, D)
        bound_values = (grad_state @ wv_h).flatten(0, 1)  # (E, C)
        grad_wk += bound_values @ gram[b]
        grad_wv += (grad_state @ keys_gram.unflatten(0, (heads, -1))).flatten(0, 1)
        grad_gram = wk.T @ bound_values
        grad_gram = (grad_gram + grad_gram.T)[:, :dim]
        for t in parts:
            grad_x[b, t].addmm_(_tokens(x[b], t, wq, mask), grad_gram)
    return grad_x, grad_wq, grad_wk, grad_wv, grad_wo


def _tokens(x: Tensor, part: slice, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """The chunk (n, C) of x (N, E): with a last channel of ones if the weights have a bias, zeros where masked."""
    chunk = x[part]
    if weight.shape[1] > x.shape[1]:
        chunk = torch.cat([chunk, chunk.new_ones(len(chunk), 1)], dim=1)
    return chunk if mask is None else chunk.masked_fill(mask[part, None], 0.0)


def _add_gram(gram: Tensor, chunk: Tensor) -> None:
    """Adds the upper triangle of chunkᵀ chunk to that of gram (C, C), and something below the diagonal."""
    for start in range(0, len(gram), GRAM_BLOCK):
        rows = slice(start, start + GRAM_BLOCK)
        gram[rows, start:].addmm_(chunk[:, rows].T, chunk[:, start:])


def _unbinding(keys_gram: Tensor, wv: Tensor, num_heads: int) -> Tensor:
    """M (H, D, D) of every head from Wk G (E, C): S = Wk G Wvᵀ, and β its anti-diagonal sums."""
    state = keys_gram.unflatten(0, (num_heads, -1)) @ wv.unflatten(0, (num_heads, -1)).mT
    return hankel(sum_of_bindings(state))


def _retrieval(wq: Tensor, unbinding: Tensor) -> Tensor:
    """The projection Wr (E, C) with x Wrᵀ = q M."""
    return (unbinding @ wq.unflatten(0, (len(unbinding), -1))).flatten(0, 1)


def _weigh(values: Tensor, weights: Tensor, out: Tensor) -> None:
    """out (n, E) = values (n, E), each head times its weight (H, n)."""
    heads = len(weights)
    torch.mul(values.unflatten(1, (heads, -1)), weights.T[..., None], out=out.unflatten(1, (heads, -1)))
