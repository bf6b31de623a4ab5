"""The passes over tokens of the folded HRR layer, in chunks that stay in cache, by torch's products.

Legend: x (N, E) are the tokens of one batch row, of C channels: E or, with a last one of ones, E + 1; a chunk has n.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.hrr.chunked import token_slices
from attention.hrr.cosine import add_cosine_gradient, cosine

GRAM_BLOCK = 64  # rows of G at a time, each from the diagonal on; narrower products run slower than they save


def gram(x: Tensor, channels: int, mask: Tensor | None) -> Tensor:
    """G = Σ x xᵀ (C, C) over the tokens that the mask (N,) does not hide."""
    total = x.new_zeros(channels, channels)
    for t in _chunks(x):
        chunk = _tokens(x, t, channels, mask)
        for start in range(0, channels, GRAM_BLOCK):
            rows = slice(start, start + GRAM_BLOCK)
            total[rows, start:].addmm_(chunk[:, rows].T, chunk[:, start:])
    return total.triu() + total.triu(1).T


def retrieve(x: Tensor, wv: Tensor, wr: Tensor, weights: Tensor, values: Tensor, retrieved: Tensor | None) -> None:
    """values = x Wvᵀ and retrieved = x Wrᵀ (N, E), where it is to be kept; weights (H, N) = exp(their cosines)."""
    scratch = x.new_empty(_chunks(x)[0].stop, x.shape[1])
    for t in _chunks(x):
        chunk = _tokens(x, t, wv.shape[1])
        pair = torch.mm(chunk, wv.T, out=values[t]), scratch[: len(chunk)] if retrieved is None else retrieved[t]
        torch.mm(chunk, wr.T, out=pair[1])
        torch.exp(cosine(*(_heads(y, weights) for y in pair)).T, out=weights[:, t])


def project(values: Tensor, weights: Tensor, wo: Tensor, out: Tensor) -> None:
    """out (N, E) = (weights (H, N) ∘ values (N, E)) Woᵀ; out may be values."""
    scratch = values.new_empty(_chunks(values)[0].stop, values.shape[1])
    for t in _chunks(values):
        torch.mm(_weigh(values[t], weights[:, t], scratch), wo.T, out=out[t])


def project_gradient(grad_out: Tensor, x: Tensor, wv: Tensor, weights: Tensor, values: Tensor, known: bool) -> Tensor:
    """The gradient of Wo; values = x Wvᵀ is written unless it is known."""
    grad_wo = x.new_zeros(x.shape[1], x.shape[1])
    scratch = x.new_empty(_chunks(x)[0].stop, x.shape[1])
    for t in _chunks(x):
        if not known:
            torch.mm(_tokens(x, t, wv.shape[1]), wv.T, out=values[t])
        grad_wo.addmm_(grad_out[t].T, _weigh(values[t], weights[:, t], scratch))
    return grad_wo


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
    """Gradients of Wr and Wv (E, C); to out, which may be values, that of x but for what G contributes.

    Args:
        delta: (H,), Σ over tokens of weight times gradient of the weight.
    """
    dim = x.shape[1]
    grad_wr, grad_wv = torch.zeros_like(wr), torch.zeros_like(wv)
    scratch = x.new_empty(3, _chunks(x)[0].stop, dim)
    for t in _chunks(x):
        chunk = _tokens(x, t, wv.shape[1])  # (n, C)
        scratch_r, dv, dr = scratch[:, : len(chunk)]
        r = torch.mm(chunk, wr.T, out=scratch_r) if retrieved is None else retrieved[t]
        torch.mm(grad_out[t], wo, out=dv)
        values_h, retrieved_h, dv_h, dr_h = (_heads(y, weights) for y in (values[t], r, dv, dr))
        weight = weights[:, t].T  # (n, H)
        grad_cosine = (torch.mul(values_h, dv_h, out=dr_h).sum(-1) - delta) * weight
        dv_h.mul_(weight[..., None])
        add_cosine_gradient(grad_cosine, values_h, retrieved_h, dv_h, dr_h)
        grad_wr.addmm_(dr.T, chunk)
        grad_wv.addmm_(dv.T, chunk)
        torch.mm(dr, wr[:, :dim], out=out[t]).addmm_(dv, wv[:, :dim])
    return grad_wr, grad_wv


def add_product(x: Tensor, mask: Tensor | None, matrix: Tensor, out: Tensor) -> None:
    """out += x matrix, for a matrix (C, E); a masked token counts as zeros."""
    for t in _chunks(x):
        out[t].addmm_(_tokens(x, t, len(matrix), mask), matrix)


def _chunks(x: Tensor) -> list[slice]:
    return token_slices(*x.shape, x.device)


def _tokens(x: Tensor, part: slice, channels: int, mask: Tensor | None = None) -> Tensor:
    """The chunk (n, C) of x (N, E), zeros where masked."""
    chunk = x[part]
    if channels > x.shape[1]:
        chunk = torch.cat([chunk, chunk.new_ones(len(chunk), 1)], dim=1)
    return chunk if mask is None else chunk.masked_fill(mask[part, None], 0.0)


def _heads(x: Tensor, weights: Tensor) -> Tensor:
    """(n, E) -> (n, H, D)."""
    return x.unflatten(1, (len(weights), -1))


def _weigh(values: Tensor, weights: Tensor, scratch: Tensor) -> Tensor:
    """values (n, E), each head times its weight (H, n), in the scratch memory."""
    out = scratch[: len(values)]
    torch.mul(_heads(values, weights), weights.T[..., None], out=_heads(out, weights))
    return out
