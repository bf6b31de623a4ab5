"""The steps of the folded HRR layer by torch's products: passes over tokens, in chunks that stay in cache, and C x C.

Legend: x (B, N, E) are the tokens, of C channels: E or, with a last one of ones, E + 1; a chunk has n of a batch row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from attention.hrr.chunked import token_slices
from attention.hrr.cosine import add_cosine_gradient, cosine
from attention.hrr.ops import hankel, sum_of_bindings

GRAM_BLOCK = 64  # rows of G at a time, each from the diagonal on; narrower products run slower than they save


def gram(x: Tensor, channels: int, mask: Tensor | None) -> Tensor:
    """G = Σ x xᵀ (B, C, C) over the tokens that the mask (B, N) does not hide."""
    total = x.new_zeros(len(x), channels, channels)
    for b, t in _chunks(x):
        chunk = _tokens(x, (b, t), channels, mask)
        for start in range(0, channels, GRAM_BLOCK):
            rows = slice(start, start + GRAM_BLOCK)
            total[b, rows, start:].addmm_(chunk[:, rows].T, chunk[:, start:])
    return total.triu() + total.triu(1).mT


def retrieval(gram: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Wk G (B, E, C); of every head, M (B, H, D, D); and the projections Wr (B, E, C) with x Wrᵀ = q M."""
    keys_gram = wk @ gram
    heads = num_heads, -1
    unbinding = hankel(sum_of_bindings(keys_gram.unflatten(1, heads) @ wv.unflatten(0, heads).mT))
    return keys_gram, unbinding, (unbinding @ wq.unflatten(0, heads)).flatten(1, 2)


def retrieve(x: Tensor, wv: Tensor, wr: Tensor, weights: Tensor, values: Tensor, retrieved: Tensor | None) -> None:
    """values = x Wvᵀ and retrieved = x Wrᵀ (B, N, E), where it is to be kept; weights (B, H, N) = exp(their cosines).

    Args:
        wv, wr: (E, C), (B, E, C).
    """
    scratch = _scratch(x)
    for b, t in _chunks(x):
        chunk = _tokens(x, (b, t), wv.shape[1])
        kept = scratch[: len(chunk)] if retrieved is None else retrieved[b, t]
        pair = torch.mm(chunk, wv.T, out=values[b, t]), torch.mm(chunk, wr[b].T, out=kept)
        torch.exp(cosine(*(_heads(y, weights) for y in pair)).T, out=weights[b, :, t])


def project(values: Tensor, weights: Tensor, wo: Tensor, out: Tensor) -> None:
    """out (B, N, E) = (weights (B, H, N) ∘ values (B, N, E)) Woᵀ; out may be values."""
    scratch = _scratch(values)
    for b, t in _chunks(values):
        torch.mm(_weigh(values[b, t], weights[b, :, t], scratch), wo.T, out=out[b, t])


def project_gradient(
    grad_out: Tensor, x: Tensor, wv: Tensor, wo: Tensor, weights: Tensor, values: Tensor, known: bool
) -> tuple[Tensor, Tensor]:
    """The gradient of Wo, by batch row (B, E, E), and δ (B, H); values = x Wvᵀ is written unless it is known."""
    grad_wo = x.new_zeros(len(x), x.shape[2], x.shape[2])
    scratch = _scratch(x)
    for b, t in _chunks(x):
        if not known:
            torch.mm(_tokens(x, (b, t), wv.shape[1]), wv.T, out=values[b, t])
        grad_wo[b].addmm_(grad_out[b, t].T, _weigh(values[b, t], weights[b, :, t], scratch))
    return grad_wo, (grad_wo * wo).sum(1).unflatten(1, (weights.shape[1], -1)).sum(-1)


def retrieve_gradient(
    grad_out: Tensor,
    x: Tensor,
    wv: Tensor,
    wr: Tensor,
    wo: Tensor,
    weights: Tensor,
    delta: Tensor,
    values: Tensor,
    retrieved: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of Wr and Wv by row (B, E, C); to out, which may be values, that of x but for what G contributes.

    Args:
        delta: δ (B, H), Σ over tokens of weight times gradient of the weight.
    """
    dim = x.shape[2]
    grad_wr, grad_wv = torch.zeros_like(wr), torch.zeros_like(wr)
    scratches = [_scratch(x) for _ in range(3)]
    for b, t in _chunks(x):
        chunk = _tokens(x, (b, t), wv.shape[1])  # (n, C)
        r, dv, dr = (scratch[: len(chunk)] for scratch in scratches)
        r = torch.mm(chunk, wr[b].T, out=r) if retrieved is None else retrieved[b, t]
        torch.mm(grad_out[b, t], wo, out=dv)
        values_h, retrieved_h, dv_h, dr_h = (_heads(y, weights) for y in (values[b, t], r, dv, dr))
        weight = weights[b, :, t].T  # (n, H)
        grad_cosine = (torch.mul(values_h, dv_h, out=dr_h).sum(-1) - delta[b]) * weight
        dv_h.mul_(weight[..., None])
        add_cosine_gradient(grad_cosine, values_h, retrieved_h, dv_h, dr_h)
        grad_wr[b].addmm_(dr.T, chunk)
        grad_wv[b].addmm_(dv.T, chunk)
        torch.mm(dr, wr[b, :, :dim], out=out[b, t]).addmm_(dv, wv[:, :dim])
    return grad_wr, grad_wv


def state_gradients(
    grad_wr: Tensor,
    grad_wv: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    gram: Tensor,
    keys_gram: Tensor,
    unbinding: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of Wq, Wk and Wv by row (B, E, C), given that of Wr and a part of Wv's, and that of G (B, C, C)."""
    heads = unbinding.shape[1], -1
    grad_wr_h, keys_gram_h = grad_wr.unflatten(1, heads), keys_gram.unflatten(1, heads)
    wq_h, wv_h = wq.unflatten(0, heads), wv.unflatten(0, heads)
    grad_wq = (unbinding @ grad_wr_h).flatten(1, 2)
    grad_state = hankel(sum_of_bindings(grad_wr_h @ wq_h.mT))  # (B, H, D, D)
    bound_values = (grad_state @ wv_h).flatten(1, 2)  # (B, E, C)
    return grad_wq, bound_values @ gram, grad_wv + (grad_state @ keys_gram_h).flatten(1, 2), wk.T @ bound_values


def add_gram_gradient(x: Tensor, mask: Tensor | None, grad_gram: Tensor, out: Tensor) -> None:
    """out += x (dG + dGᵀ), without the channel of ones; a masked token counts as zeros."""
    matrices = (grad_gram + grad_gram.mT)[..., : x.shape[2]]
    for b, t in _chunks(x):
        out[b, t].addmm_(_tokens(x, (b, t), grad_gram.shape[1], mask), matrices[b])


def _slices(x: Tensor) -> list[slice]:
    return token_slices(*x.shape[1:], x.device)


def _chunks(x: Tensor) -> Iterator[tuple[int, slice]]:
    """(batch row, tokens) of every chunk."""
    return ((b, t) for b in range(len(x)) for t in _slices(x))


def _scratch(x: Tensor) -> Tensor:
    """Memory for the largest chunk (n, E)."""
    return x.new_empty(_slices(x)[0].stop, x.shape[2])


def _tokens(x: Tensor, part: tuple[int, slice], channels: int, mask: Tensor | None = None) -> Tensor:
    """The chunk (n, C) of x (B, N, E), zeros where masked."""
    chunk = x[part]
    if channels > x.shape[2]:
        chunk = torch.cat([chunk, chunk.new_ones(len(chunk), 1)], dim=1)
    return chunk if mask is None else chunk.masked_fill(mask[part][:, None], 0.0)


def _heads(x: Tensor, weights: Tensor) -> Tensor:
    """(n, E) -> (n, H, D)."""
    return x.unflatten(1, (weights.shape[1], -1))


def _weigh(values: Tensor, weights: Tensor, scratch: Tensor) -> Tensor:
    """values (n, E), each head times its weight (H, n), in the scratch memory."""
    out = scratch[: len(values)]
    heads = len(weights), -1
    torch.mul(values.unflatten(1, heads), weights.T[..., None], out=out.unflatten(1, heads))
    return out
