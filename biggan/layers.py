"""Small pieces that both networks use: resampling and initialisation."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def upsample2x(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling: (B, C, H, W) -> (B, C, 2H, 2W), in the memory format of x.

    By expand and reshape: the backward of `F.interpolate` falls back to the host on XLA.
    """
    batch, channels, height, width = x.shape
    if x.is_contiguous(memory_format=torch.channels_last):
        pixels = x.permute(0, 2, 3, 1)[:, :, None, :, None, :].expand(-1, -1, 2, -1, 2, -1)  # (B, H, 2, W, 2, C)
        return pixels.reshape(batch, 2 * height, 2 * width, channels).permute(0, 3, 1, 2)
    pixels = x[:, :, :, None, :, None].expand(-1, -1, -1, 2, -1, 2)  # (B, C, H, 2, W, 2)
    return pixels.reshape(batch, channels, 2 * height, 2 * width)


def downsample2x(x: Tensor) -> Tensor:
    """Means of 2x2 squares: (B, C, H, W) -> (B, C, H/2, W/2)."""
    return F.avg_pool2d(x, 2)


@torch.no_grad()
def initialize_orthogonal(model: nn.Module) -> None:
    """Fills the weight of every convolution, linear layer and embedding with a (semi-)orthogonal matrix (out, in).

    Call it before the model leaves the CPU: the QR decomposition has no XLA form. Source: Saxe et al. 2014,
    arXiv:1312.6120.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, nn.Embedding)):
            nn.init.orthogonal_(module.weight)
