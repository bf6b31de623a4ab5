"""FNet: the Fourier transform over tokens and channels in the place of attention.

Lee-Thorp et al. 2021, "FNet: Mixing Tokens with Fourier Transforms", https://arxiv.org/abs/2105.03824, Eq. 3:

    y = Re(F_tokens(F_channels(x)))

without parameters. By torch's FFT where there is one, by products with the matrices of cosines and sines elsewhere, as
the paper does on a TPU: Re((C - iS) x (C' - iS')) = C x C' - S x S'.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attention.registry import check_tokens, register

FFT_DEVICES = ("cpu", "cuda")
SELF_ATTENTION = "it is a layer of self-attention"


def fourier_mixing(x: Tensor) -> Tensor:
    """Re(F_tokens(F_channels(x))): (B, N, C) -> (B, N, C), in float32 at least inside.

    `fourier_mixing_by_matmul` computes the same.
    """
    mixed = torch.fft.fft2(x.to(torch.promote_types(x.dtype, torch.float32)), dim=(-2, -1))
    return mixed.real.to(x.dtype)


def fourier_mixing_by_matmul(x: Tensor) -> Tensor:
    """`fourier_mixing` without a Fourier transform; holds two matrices N x N."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    with torch.autocast(x.device.type, enabled=False):
        token_cos, token_sin = _fourier_matrices(x.shape[1], wide)
        channel_cos, channel_sin = _fourier_matrices(x.shape[2], wide)
        return (token_cos @ wide @ channel_cos - token_sin @ wide @ channel_sin).to(x.dtype)


def _fourier_matrices(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin of 2π jk / size, (size, size) each; jk is reduced first, as an integer, so that no angle is large."""
    j = torch.arange(size, device=like.device)
    angles = (j[:, None] * j % size).to(like.dtype) * (2 * math.pi / size)
    return angles.cos(), angles.sin()


@register(
    "fnet",
    unequal_lengths=SELF_ATTENTION,
    value_dim=SELF_ATTENTION,
    masks="a Fourier transform over tokens depends on their number, padding included",
    causal="every frequency holds all tokens",
    layer=True,
)
class FNetMixing(nn.Module):
    """`fourier_mixing` as a layer, without parameters.

    Args:
        dim: channels C.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C) -> (B, N, C); ValueError where there is a mask."""
        check_tokens(self.name, x, self.dim, key_padding_mask)
        return fourier_mixing(x) if x.device.type in FFT_DEVICES else fourier_mixing_by_matmul(x)
