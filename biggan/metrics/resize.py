"""Resizing by the three rules that published FID numbers use, as products with constant matrices.

The bilinear two do not filter before they shrink an image, and differ in where they read; clean-fid's does filter
(Parmar et al. 2022, "On Aliased Resizing and Surprising Subtleties in GAN Evaluation", arXiv:2104.11222). A Fréchet
distance is comparable only with distances computed under the same rule. A resize is linear and separable,
`M_h @ x @ M_w.T`, which runs the same on every device (bilinear interpolation falls back to the host on torch-xla).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# rule -> (value that becomes 0 in the FID's network, distance from that value that becomes 1)
RESIZE_RULES = {
    "pytorch-fid": (127.5, 127.5),  # bilinear, half-pixel centres, then 2 x/255 - 1
    "tensorflow": (128.0, 128.0),  # TensorFlow 1 and torch-fidelity: bilinear, src = dst * scale, then (x - 128) / 128
    "clean-fid": (128.0, 128.0),  # Pillow's antialiased bicubic filter on float32 pixels, then (x - 128) / 128
}


def check_resize_rule(rule: str) -> None:
    """Raises ValueError, listing the rules, for a name that is not one of them."""
    if rule not in RESIZE_RULES:
        raise ValueError(f"unknown resize rule {rule!r}; choose from {', '.join(RESIZE_RULES)}")


@lru_cache(maxsize=16)
def resize_matrix(in_size: int, out_size: int, rule: str) -> Tensor:
    """(out_size, in_size) float32: row i holds the weights of the input pixels that make output pixel i."""
    check_resize_rule(rule)
    if rule == "clean-fid":
        return _bicubic_matrix(in_size, out_size).float()
    return _bilinear_matrix(in_size, out_size, centre=0.5 if rule == "pytorch-fid" else 0.0).float()


def _bilinear_matrix(in_size: int, out_size: int, centre: float) -> Tensor:
    """`centre` is the place of a pixel's centre in it."""
    source = (torch.arange(out_size, dtype=torch.float64) + centre) * (in_size / out_size) - centre
    source = source.clamp(0, in_size - 1)  # edge pixels are repeated outside
    low = source.floor().long()
    high = (low + 1).clamp(max=in_size - 1)
    fraction = (source - low).unsqueeze(1)
    matrix = torch.zeros(out_size, in_size, dtype=torch.float64)
    matrix.scatter_add_(1, low.unsqueeze(1), 1 - fraction)
    matrix.scatter_add_(1, high.unsqueeze(1), fraction)
    return matrix


def _bicubic_matrix(in_size: int, out_size: int) -> Tensor:
    """Keys' cubic (a = -1/2), stretched where it shrinks an image, over the pixels inside, its weights scaled to 1."""
    scale = in_size / out_size
    stretch = max(scale, 1.0)
    centre = (torch.arange(out_size, dtype=torch.float64).unsqueeze(1) + 0.5) * scale
    pixel = torch.arange(in_size, dtype=torch.float64)
    first, last = (centre - 2 * stretch + 0.5).trunc(), (centre + 2 * stretch + 0.5).trunc()
    x = (pixel - centre + 0.5).abs() / stretch
    near = (1.5 * x - 2.5) * x**2 + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, 0.0)) * ((pixel >= first) & (pixel < last))
    return weights / weights.sum(dim=1, keepdim=True)


def resize(images: Tensor, size: int, rule: str) -> Tensor:
    """Images (B, C, H, W) in 0..255, any dtype -> float32 (B, C, size, size), still in 0..255.

    Raises:
        ValueError: unknown rule.
    """
    check_resize_rule(rule)
    images = images.float()
    height, width = images.shape[-2:]
    if width != size:
        images = images @ resize_matrix(width, size, rule).to(images.device).T  # (B, C, H, size)
    if height != size:
        images = resize_matrix(height, size, rule).to(images.device) @ images  # (B, C, size, size)
    return images.clamp(0, 255) if rule == "clean-fid" else images  # bicubic weights overshoot


def normalise(images: Tensor, rule: str) -> Tensor:
    """0..255 -> about [-1, 1], by the constants that belong to the rule."""
    check_resize_rule(rule)
    middle, half_range = RESIZE_RULES[rule]
    return (images - middle) / half_range
