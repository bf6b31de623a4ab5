"""How far a Fréchet distance can be trusted: its spread over samples, and its value at infinitely many of them.

The generated images are dealt at random over ten chunks, of which only the moments are kept. From these follow the
distances of nine chunks, ten times, and of either half:

- The delete-one-chunk jackknife gives the standard error. It is the linear approximation of the bootstrap (Efron &
  Tibshirani 1993, "An Introduction to the Bootstrap", chapters 11 and 20) at 10 distances instead of
  hundreds. It never draws an image twice: a replicate of the bootstrap has fewer distinct images, and as the bias falls
  as 1/N, each would lie above the distance.
- The distance of N samples is biased by about c / N (Chong & Forsyth 2020, "Effectively Unbiased FID",
  arXiv:1911.07023). A line through the mean distances at N/2, 9N/10 and N as a function of 1/N, read at 0, is FID∞.
  Every image is in the mean at each size equally often, so that the sampling noise nearly cancels in the slope.

Both speak of the generated side; the reference is taken as given, as in every published FID.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from biggan.metrics.frechet import FrechetReference
from biggan.metrics.moments import Moments

NUM_CHUNKS = 10
MIN_IMAGES = 2 * NUM_CHUNKS  # a chunk of fewer than two images says nothing about a covariance
STUDENT_975 = 2.262  # 97.5% quantile of Student's t with NUM_CHUNKS - 1 degrees of freedom
CHUNK_SEED = 0
BUFFER_ROWS = 512  # a handful of rows at a time would be bound by the memory traffic of ten matrices


class ChunkedMoments:
    """Moments of `num_images` features, dealt over `NUM_CHUNKS` chunks at random: also a sorted folder's are alike.

    Memory: 8 * dim² bytes a chunk, 340 MB in all at 2048 features.

    Attributes:
        count: number of features seen.
    """

    def __init__(self, num_images: int, dim: int, device: torch.device | str = "cpu") -> None:
        order = torch.randperm(num_images, generator=torch.Generator().manual_seed(CHUNK_SEED))
        self._chunk_of = torch.empty(num_images, dtype=torch.int64)
        self._chunk_of[order] = torch.arange(num_images) * NUM_CHUNKS // num_images
        self._chunks = [Moments(dim, device) for _ in range(NUM_CHUNKS)]
        self._buffer = torch.empty(0, dim)
        self.count = 0

    def update(self, features: Tensor) -> None:
        """Add features (B, dim); those of image number `count` first."""
        self.count += len(features)
        self._buffer = torch.cat([self._buffer.to(features.device), features])
        if len(self._buffer) >= BUFFER_ROWS:
            self._flush()

    def _flush(self) -> None:
        chunk_of = self._chunk_of[self.count - len(self._buffer) : self.count].to(self._buffer.device)
        for index, chunk in enumerate(self._chunks):
            chunk.update(self._buffer[chunk_of == index])
        self._buffer = self._buffer[:0]

    def merged(self, indices: range | list[int] = range(NUM_CHUNKS)) -> Moments:
        """The moments of all features in the given chunks."""
        self._flush()
        first = self._chunks[indices[0]]
        whole = Moments(len(first.mean), first.mean.device)
        for index in indices:
            whole.merge(self._chunks[index])
        return whole

    def state_dict(self) -> dict:
        return {"count": self.count, "buffer": self._buffer, "chunks": [chunk.state_dict() for chunk in self._chunks]}

    def load_state_dict(self, state: dict) -> None:
        self.count, self._buffer = int(state["count"]), state["buffer"]
        for chunk, part in zip(self._chunks, state["chunks"], strict=True):
            chunk.load_state_dict(part)


@dataclass(frozen=True)
class Estimate:
    """A Fréchet distance, the 95% interval of what other samples of as many images give, and FID∞."""

    distance: float
    low: float
    high: float
    infinite: float


def estimate(moments: ChunkedMoments, reference: FrechetReference) -> Estimate:
    """Distance and confidence, from 13 distances.

    Raises:
        ValueError: fewer than `MIN_IMAGES` images.
    """
    if moments.count < MIN_IMAGES:
        raise ValueError(f"an interval needs at least {MIN_IMAGES} images, got {moments.count}")
    everything, half = list(range(NUM_CHUNKS)), NUM_CHUNKS // 2
    without_one = [[i for i in everything if i != left_out] for left_out in everything]
    subsets = {"all": [everything], "without one": without_one, "halves": [everything[:half], everything[half:]]}
    inverse_counts, means, distances = [], [], {}
    for name, selections in subsets.items():
        parts = [moments.merged(selection) for selection in selections]
        distances[name] = np.array([reference.distance(part.mean, part.covariance) for part in parts])
        inverse_counts.append(np.mean([1 / part.count for part in parts]))
        means.append(distances[name].mean())
    (distance,) = distances["all"]
    error = np.sqrt((NUM_CHUNKS - 1) * distances["without one"].var())  # Efron & Tibshirani 1993, Eq. 11.5
    margin = STUDENT_975 * error
    infinite = np.polynomial.Polynomial.fit(inverse_counts, means, 1)(0.0)
    return Estimate(float(distance), float(distance - margin), float(distance + margin), float(infinite))
