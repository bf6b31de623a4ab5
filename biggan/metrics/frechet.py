"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frechet_distance(
    mean1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mean2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> float:
    """`|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`, in float64.

    The trace is that of the symmetric `(S1^½ S2 S1^½)^½`, whose eigenvalues are the square roots of those of `S1 S2`:
    two symmetric eigendecompositions, so that covariances without full rank (fewer samples than dimensions) are no
    special case. With `S1 = V L Vᵀ`, the inner matrix is similar to `L^½ Vᵀ S2 V L^½`. Eigenvalues at the level of
    rounding are dropped: their square roots would be far above it.

    Args:
        mean1, mean2: (dim,).  cov1, cov2: (dim, dim), symmetric positive semi-definite.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.

    Source: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; as a measure of
    generators, Heusel et al. 2017, arXiv:1706.08500.
    """
    mean1, cov1, mean2, cov2 = (torch.as_tensor(part).cpu().double() for part in (mean1, cov1, mean2, cov2))
    shapes = [tuple(part.shape) for part in (mean1, cov1, mean2, cov2)]
    dim = mean1.numel()
    if shapes != [(dim,), (dim, dim)] * 2:
        raise ValueError(f"expected means (dim,) and covariances (dim, dim) of one dim, got {shapes}")
    if not all(part.isfinite().all() for part in (mean1, cov1, mean2, cov2)):
        raise ValueError("a mean or covariance is not finite")

    values, vectors = torch.linalg.eigh(cov1)
    kept = values > _rounding_level(values)
    root = vectors[:, kept] * values[kept].sqrt()  # (dim, rank): V L^½
    inner = torch.linalg.eigvalsh(root.T @ cov2 @ root)  # (rank,), the eigenvalues of S1 S2 that are not 0
    trace_root = inner[inner > _rounding_level(inner)].sqrt().sum()
    distance = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_root
    return distance.item()


def _rounding_level(eigenvalues: Tensor) -> float:
    """Eigenvalues of a symmetric matrix below this cannot be told from 0 (the rule of `numpy.linalg.matrix_rank`)."""
    if eigenvalues.numel() == 0:
        return 0.0
    return eigenvalues.abs().max().item() * eigenvalues.numel() * torch.finfo(torch.float64).eps
