"""Mean and covariance of a stream of features, in float64, without keeping the features."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Running count, mean and sum of outer products of deviations, merged batch by batch.

    Of two parts a and b with delta = mean_b - mean_a, `S = S_a + S_b + delta deltaᵀ n_a n_b / (n_a + n_b)`. Unlike
    E[xxᵀ] - E[x]E[x]ᵀ it never subtracts large, nearly equal numbers.

    Source: Chan, Golub & LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".

    Attributes:
        count: number of samples seen.
        mean: float64 (dim,).
        scatter: float64 (dim, dim), the sum of outer products of deviations from the mean.
    """

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add features (B, dim), of any floating type and device.

        Raises:
            ValueError: another shape.
        """
        if features.dim() != 2 or features.shape[1] != len(self.mean):
            raise ValueError(f"expected features (B, {len(self.mean)}), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        features = features.to(self.mean.device).double()  # in this order: some accelerators have no float64
        batch_mean = features.mean(dim=0)
        deviations = features - batch_mean
        self.scatter.addmm_(deviations.T, deviations)
        self._join(len(features), batch_mean)

    def merge(self, other: Moments) -> None:
        """Add all that `other` has seen, as if its batches had come here."""
        if other.count:
            self.scatter += other.scatter.to(self.scatter.device)
            self._join(other.count, other.mean.to(self.mean.device))

    def _join(self, count: int, mean: Tensor) -> None:
        total = self.count + count
        delta = mean - self.mean
        self.scatter.addr_(delta, delta, alpha=self.count * count / total)
        self.mean += delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> Tensor:
        """Float64 (dim, dim), divided by count - 1.

        Raises:
            ValueError: fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)

    def state_dict(self) -> dict[str, int | Tensor]:
        return {"count": self.count, "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    def load_state_dict(self, state: dict[str, int | Tensor]) -> None:
        self.count = int(state["count"])
        self.mean.copy_(state["mean"])
        self.scatter.copy_(state["scatter"])
