"""HRR attention written down plainly, twice: with O(D²) loops in float64, and with the Fourier transforms of the paper.

The standards that the fast form is tested against.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def bind_loop(x: Tensor, y: Tensor) -> Tensor:
    """b[n] = Σ_i x[i] y[(n - i) mod d], in float64."""
    x, y = x.double(), y.double()
    dim = x.shape[-1]
    return torch.stack([sum(x[..., i] * y[..., (n - i) % dim] for i in range(dim)) for n in range(dim)], dim=-1)


def unbind_loop(bound: Tensor, x: Tensor) -> Tensor:
    """y[n] = Σ_i x[i] b[(n + i) mod d], in float64."""
    bound, x = bound.double(), x.double()
    dim = x.shape[-1]
    return torch.stack([sum(x[..., i] * bound[..., (n + i) % dim] for i in range(dim)) for n in range(dim)], dim=-1)


def bind_fft(x: Tensor, y: Tensor) -> Tensor:
    """F⁻¹(F x · F y)."""
    return torch.fft.ifft(torch.fft.fft(x) * torch.fft.fft(y)).real


def unbind_fft(bound: Tensor, x: Tensor) -> Tensor:
    """F⁻¹(conj(F x) · F b)."""
    return torch.fft.ifft(torch.fft.fft(x).conj() * torch.fft.fft(bound)).real


def naive_hrr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    bind: Callable[[Tensor, Tensor], Tensor] = bind_loop,
    unbind: Callable[[Tensor, Tensor], Tensor] = unbind_loop,
) -> tuple[Tensor, Tensor]:
    """out (B, H, N, D) and weights (B, H, N), token by token; every row needs a token and vectors other than zero.

    Source: Alam et al. 2023, arXiv:2305.19534, Eqs. 1-4.
    """
    bound = bind(k, v)  # (B, H, N, D)
    if key_padding_mask is not None:
        bound = bound.masked_fill(key_padding_mask[:, None, :, None], 0.0)
    retrieved = unbind(bound.sum(dim=2, keepdim=True), q)  # (B, H, N, D)
    v = v.to(retrieved.dtype)
    cosine = (v * retrieved).sum(-1) / (v.norm(dim=-1) * retrieved.norm(dim=-1))  # (B, H, N)
    if key_padding_mask is not None:
        cosine = cosine.masked_fill(key_padding_mask[:, None], -torch.inf)
    weights = torch.softmax(cosine, dim=-1)
    return weights[..., None] * v, weights
