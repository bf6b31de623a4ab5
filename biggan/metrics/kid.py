"""Kernel distance of two sets of features: the unbiased squared maximum mean discrepancy under a polynomial kernel.

Source: Bińkowski et al. 2018, "Demystifying MMD GANs", arXiv:1801.01401, section 4. The subsets are drawn as
torch-fidelity draws them, so that equal features give equal numbers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

SEED = 2020


def default_subset_size(num_images: int) -> int:
    """1000 as is customary; half of a set of fewer than 2000 images, so that the subsets differ."""
    return max(2, min(1000, num_images // 2))


def kernel_distances(
    generated: Tensor, real: Tensor, subset_size: int, num_subsets: int, device: torch.device | str = "cpu"
) -> np.ndarray:
    """Distances of `num_subsets` pairs of random subsets, drawn without replacement: float64 (num_subsets,).

    Args:
        generated: (N, dim).  real: (M, dim).

    Raises:
        ValueError: subsets of fewer than 2 or of more than there are, or no subset.
    """
    smallest = min(len(generated), len(real))
    if not 2 <= subset_size <= smallest or num_subsets < 1:
        raise ValueError(f"expected 1 or more subsets of 2 .. {smallest}, got {num_subsets} of {subset_size}")
    random = np.random.RandomState(SEED)
    distances = []
    for _ in range(num_subsets):
        chosen = [
            side[torch.from_numpy(random.choice(len(side), subset_size, replace=False))].to(device).double()
            for side in (generated, real)
        ]
        distances.append(squared_mmd(*chosen).item())
    return np.array(distances)


def squared_mmd(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased estimate from x, y (m, dim): within each set no pair of a point with itself (Eq. 4)."""
    m = len(x)
    within = sum(k.sum() - k.diagonal().sum() for k in (polynomial_kernel(x, x), polynomial_kernel(y, y)))
    return within / (m * (m - 1)) - 2 * polynomial_kernel(x, y).mean()


def polynomial_kernel(x: Tensor, y: Tensor) -> Tensor:
    """(x·y / dim + 1)³ of all pairs: (m, dim), (n, dim) -> (m, n)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def standard_error(distances: np.ndarray, subset_size: int, num_images: int) -> float:
    """Standard error of the mean over subsets, which overlap, as an estimate from `num_images` on the smaller side.

    The variance of a subset's distance given all images is s² = σ² (1/m - 1/n) to first order, for m of n drawn without
    replacement. The mean over S subsets has σ²/n + s²/S, where σ²/n = s² m / (n - m). NaN where every subset is the
    whole set.
    """
    if subset_size >= num_images or len(distances) < 2:
        return float("nan")
    ratio = subset_size / (num_images - subset_size)
    return float(np.std(distances, ddof=1) * np.sqrt(ratio + 1 / len(distances)))
