"""The Fréchet distance between two Gaussians."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


def frechet_distance(
    mean1: Tensor | np.ndarray, cov1: Tensor | np.ndarray, mean2: Tensor | np.ndarray, cov2: Tensor | np.ndarray
) -> float:
    """`|m1 - m2|² + tr(S1 + S2 - 2 (S1 S2)^½)`, in float64.

    With any roots `S1 = R1 R1ᵀ`, `S2 = R2 R2ᵀ` the trace of the root is the sum of the singular values of `R1ᵀ R2`.
    (Those of `R1ᵀ S2 R1` are their squares, so that the many small ones would drown in rounding: 3% of a FID of 0.06.)
    R is the Cholesky factor, or, of a covariance without full rank (fewer samples than dimensions), eigenvectors times
    the roots of eigenvalues.

    Args:
        mean1, mean2: (dim,).  cov1, cov2: (dim, dim), symmetric positive semi-definite.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.

    Source: Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; as a measure of
    generators, Heusel et al. 2017, arXiv:1706.08500.
    """
    return FrechetReference(mean1, cov1).distance(mean2, cov2)


class FrechetReference:
    """A Gaussian that several others are compared with: its covariance is factored once.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """

    def __init__(self, mean: Tensor | np.ndarray, covariance: Tensor | np.ndarray) -> None:
        self.mean, covariance = _checked(mean, covariance)
        self._root, self._trace = _root(covariance), covariance.trace()

    def distance(self, mean: Tensor | np.ndarray, covariance: Tensor | np.ndarray) -> float:
        """The distance to another Gaussian of the same dim; see `frechet_distance`."""
        mean, covariance = _checked(mean, covariance)
        if mean.shape != self.mean.shape:
            raise ValueError(f"expected Gaussians of one dim, got {len(self.mean)} and {len(mean)}")
        trace_root = torch.linalg.svdvals(self._root.T @ _root(covariance)).sum()
        shift = (self.mean - mean).square().sum()
        return (shift + self._trace + covariance.trace() - 2 * trace_root).item()


def _checked(mean: Tensor | np.ndarray, covariance: Tensor | np.ndarray) -> tuple[Tensor, Tensor]:
    mean, covariance = (torch.as_tensor(part).cpu().double() for part in (mean, covariance))
    if mean.dim() != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = tuple(mean.shape), tuple(covariance.shape)
        raise ValueError(f"expected a mean (dim,) and a covariance (dim, dim) of one dim, got {shapes}")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError("a mean or covariance is not finite")
    return mean, covariance


def _root(covariance: Tensor) -> Tensor:
    """R (dim, rank) with `covariance = R Rᵀ`."""
    root, is_singular = torch.linalg.cholesky_ex(covariance)  # a tenth of the time of eigenvectors
    if not is_singular:
        return root
    values, vectors = torch.linalg.eigh(covariance)
    # Below this a value cannot be told from 0 (the rule of `numpy.linalg.matrix_rank`).
    kept = values > values.abs().max() * len(values) * torch.finfo(torch.float64).eps
    return vectors[:, kept] * values[kept].sqrt()
