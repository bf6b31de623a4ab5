"""Bilinear resizing by the two rules that published FID numbers use, as products with constant matrices.

Neither rule filters before it shrinks an image, and they differ in where they read: a Fréchet distance is comparable
only with distances computed under the same rule. A resize is linear and separable, `M_h @ x @ M_w.T`, which runs the
same on every device (bilinear interpolation falls back to the host on torch-xla).
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# rule -> (place of a pixel's centre in it, value that becomes 0, distance from that value that becomes 1)
RESIZE_RULES = {
    "pytorch-fid": (0.5, 127.5, 127.5),  # half-pixel centres, then 2 x/255 - 1
    "tensorflow": (0.0, 128.0, 128.0),  # TensorFlow 1 and torch-fidelity: src = dst * scale, then (x - 128) / 128
}


def check_resize_rule(rule: str) -> None:
    """Raises ValueError, listing the rules, for a name that is not one of them."""
    if rule not in RESIZE_RULES:
        raise ValueError(f"unknown resize rule {rule!r}; choose from {', '.join(RESIZE_RULES)}")


@lru_cache(maxsize=16)
def resize_matrix(in_size: int, out_size: int, rule: str) -> Tensor:
    """(out_size, in_size) float32: row i holds the two bilinear weights that make output pixel i."""
    check_resize_rule(rule)
    centre = RESIZE_RULES[rule][0]
    source = (torch.arange(out_size, dtype=torch.float64) + centre) * (in_size / out_size) - centre
    source = source.clamp(0, in_size - 1)  # edge pixels are repeated outside
    low = source.floor().long()
    high = (low + 1).clamp(max=in_size - 1)
    fraction = (source - low).unsqueeze(1)
    matrix = torch.zeros(out_size, in_size, dtype=torch.float64)
    matrix.scatter_add_(1, low.unsqueeze(1), 1 - fraction)
    matrix.scatter_add_(1, high.unsqueeze(1), fraction)
    return matrix.float()


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
    return images


def normalise(images: Tensor, rule: str) -> Tensor:
    """0..255 -> about [-1, 1], by the constants that belong to the rule."""
    check_resize_rule(rule)
    _, middle, half_range = RESIZE_RULES[rule]
    return (images - middle) / half_range
