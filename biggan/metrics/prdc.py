"""Quality and variety apart: improved precision and recall, density and coverage, from nearest neighbours of features.

A set's manifold is the union of balls around its points, each reaching to the point's k-th neighbour of the same set.

Sources: Kynkäänniemi et al. 2019, "Improved Precision and Recall Metric", arXiv:1904.06991, section 2 (k = 3); Naeem et
al. 2020, "Reliable Fidelity and Diversity Metrics", arXiv:2002.09797, section 3 (k = 5).
"""

from __future__ import annotations

import torch
from torch import Tensor

from biggan.metrics.inception import full_float32

PRECISION_RECALL_K = 3
DENSITY_COVERAGE_K = 5
CHUNK_VALUES = 1 << 25  # distances in memory at a time, 128 MB


@torch.no_grad()
def precision_recall_density_coverage(
    generated: Tensor, real: Tensor, device: torch.device | str = "cpu"
) -> dict[str, float]:
    """
    Args:
        generated: float32 (N, dim).  real: float32 (M, dim).

    Returns:
        precision: the fraction of generated points inside the real manifold; recall: the reverse; density: how many
        real balls hold a generated point, over k; coverage: the fraction of real balls that hold a generated point.

    Raises:
        ValueError: a side has no k-th neighbours.
    """
    if min(len(generated), len(real)) <= DENSITY_COVERAGE_K:
        raise ValueError(f"expected more than {DENSITY_COVERAGE_K} points on each side")
    generated, real = generated.to(device), real.to(device)
    real_radii = neighbour_distances(real, [PRECISION_RECALL_K, DENSITY_COVERAGE_K])  # (2, M)
    (generated_radii,) = neighbour_distances(generated, [PRECISION_RECALL_K])
    precise = balls = 0
    recalled, covered = (torch.zeros(len(real), dtype=torch.bool, device=device) for _ in range(2))
    for rows, distances in distance_chunks(generated, real):  # (rows, M)
        precise += (distances <= real_radii[0]).any(dim=1).sum().item()
        inside = distances <= real_radii[1]
        balls += inside.sum().item()
        covered |= inside.any(dim=0)
        recalled |= (distances <= generated_radii[rows].unsqueeze(1)).any(dim=0)
    return {
        "precision": precise / len(generated),
        "recall": recalled.double().mean().item(),
        "density": balls / (DENSITY_COVERAGE_K * len(generated)),
        "coverage": covered.double().mean().item(),
    }


def neighbour_distances(points: Tensor, ks: list[int]) -> Tensor:
    """Distance of each point to its k-th nearest other point: (N, dim) -> (len(ks), N)."""
    parts = [
        distances.topk(max(ks) + 1, dim=1, largest=False).values[:, ks]  # the 0th is the point itself
        for _, distances in distance_chunks(points, points)
    ]
    return torch.cat(parts).T


def distance_chunks(x: Tensor, y: Tensor):
    """Yields (slice of x's rows, their Euclidean distances to all of y)."""
    size = max(1, CHUNK_VALUES // len(y))
    for start in range(0, len(x), size):
        rows = slice(start, min(start + size, len(x)))
        with full_float32():
            distances = torch.cdist(x[rows], y)
        yield rows, distances
