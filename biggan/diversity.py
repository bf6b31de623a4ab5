"""How different samples are from each other, against how different images of the data are.

Distances between fixed random features: means and deviations over the image of what three untrained convolutions say,
the same in every run, so that the measure needs no pretrained network and does not move with the training. Untrained
features order sets of images well enough for this (Naeem et al. 2020, arXiv:2002.09797, section 5).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (3, 16, 32, 64)
FEATURES_SEED = 0
CHUNK_IMAGES = 16  # in memory at a time


def random_features(images: Tensor) -> Tensor:
    """uint8 (N, 3, R, R) -> float32 (N, 2 * (16 + 32 + 64)), on the host."""
    return torch.cat([_features(chunk) for chunk in images.split(CHUNK_IMAGES)])


def _features(images: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(FEATURES_SEED)
    x, found = images.float() / 127.5 - 1, []
    for before, width in zip(WIDTHS, WIDTHS[1:], strict=False):
        kernel = torch.randn(width, before, 3, 3, generator=generator) * (2 / (9 * before)) ** 0.5
        x = F.relu(F.conv2d(x, kernel, stride=2, padding=1))  # (N, width, R / 2, R / 2)
        found += [x.mean((2, 3)), x.std((2, 3), correction=0)]
    return torch.cat(found, 1)


class Diversity:
    """Measures samples against images of the data, uint8 (M, 3, R, R) with M of at least 2."""

    def __init__(self, real: Tensor) -> None:
        features = random_features(real)
        self.scale = features.std(0).clamp(min=1e-6)  # so that each feature has its say
        self.pairwise, self.nearest = self._distances(features)

    def __call__(self, samples: Tensor) -> dict[str, float]:
        """Of as many samples as there were real images: 0 where all are equal, about 1 where they differ as those do.

        Returns:
            `diversity`, the mean distance of two samples, which falls when all become alike; `diversity_nearest`, the
            mean distance to the nearest other sample, which falls as well when a few images repeat. Both are divided
            by that of the real images.
        """
        pairwise, nearest = self._distances(random_features(samples))
        return {
            "diversity": pairwise / max(self.pairwise, 1e-6),
            "diversity_nearest": nearest / max(self.nearest, 1e-6),
        }

    def _distances(self, features: Tensor) -> tuple[float, float]:
        features = features / self.scale
        distances = torch.cdist(
            features, features, compute_mode="donot_use_mm_for_euclid_dist"
        )  # equal rows: exactly 0
        count = len(distances)
        others = distances + torch.diag(torch.full((count,), torch.inf))
        return float(distances.sum() / (count * (count - 1))), float(others.min(1).values.mean())
