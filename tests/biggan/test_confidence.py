"""Intervals and FID∞ from ten chunks, against what many samples do."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from biggan.metrics.confidence import BUFFER_ROWS, NUM_CHUNKS, ChunkedMoments, estimate
from biggan.metrics.frechet import FrechetReference, frechet_distance

DIM = 12


def moments_of(features: torch.Tensor, batch_size: int = 100) -> ChunkedMoments:
    moments = ChunkedMoments(len(features), features.shape[1])
    for batch in features.split(batch_size):
        moments.update(batch)
    return moments


def sample(seed: int, count: int) -> torch.Tensor:
    return torch.randn(count, DIM, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.5, 2, DIM)


@pytest.mark.parametrize("batch_size", [7, 64, 1300])
def test_chunks_together_are_the_whole(batch_size: int) -> None:
    features = sample(0, 2 * BUFFER_ROWS + 100)
    whole = moments_of(features, batch_size).merged()
    assert whole.count == len(features)
    np.testing.assert_allclose(whole.covariance, np.cov(features.double().numpy(), rowvar=False), atol=1e-12)


def test_chunks_of_a_sorted_folder_are_alike() -> None:
    """Each has its share of every part of the order, and no more than chance."""
    position = torch.arange(1000.0).unsqueeze(1)
    moments = moments_of(position)
    means = [moments.merged([index]).mean.item() for index in range(NUM_CHUNKS)]
    assert {moments.merged([index]).count for index in range(NUM_CHUNKS)} == {100}
    assert 5 < np.std(means) < 60  # of 100 random places of 1000: 288 / sqrt(100) = 29


def test_continuing_from_a_state_is_exact() -> None:
    features = sample(1, 900)
    whole, first = ChunkedMoments(900, DIM), ChunkedMoments(900, DIM)
    for batch in features.split(70):
        whole.update(batch)
    for batch in features[:630].split(70):
        first.update(batch)
    resumed = ChunkedMoments(900, DIM)
    resumed.load_state_dict(first.state_dict())
    for batch in features[630:].split(70):
        resumed.update(batch)
    assert torch.equal(resumed.merged().mean, whole.merged().mean)
    assert torch.equal(resumed.merged().covariance, whole.merged().covariance)


@pytest.fixture(scope="module")
def repeated() -> list:
    """Estimates from 60 samples of 400 each, against the Gaussian that they are drawn from, at distance 0.12."""
    std = np.linspace(0.5, 2, DIM)
    reference = FrechetReference(np.full(DIM, 0.1), np.diag(std**2))
    return [estimate(moments_of(sample(seed, 400)), reference) for seed in range(100, 160)]


def test_the_interval_is_as_wide_as_samples_spread(repeated: list) -> None:
    spread = np.std([found.distance for found in repeated], ddof=1)
    half_width = np.mean([found.high - found.low for found in repeated]) / 2
    assert half_width == pytest.approx(2.262 * spread, rel=0.25)
    middle = np.mean([found.distance for found in repeated])
    assert np.mean([found.low <= middle <= found.high for found in repeated]) >= 0.85


def test_infinitely_many_samples_leave_no_bias(repeated: list) -> None:
    """The true distance is known: 12 means off by 0.1."""
    bias = np.mean([found.distance for found in repeated]) - 0.12
    left = np.mean([found.infinite for found in repeated]) - 0.12
    error = np.std([found.infinite for found in repeated]) / np.sqrt(len(repeated))
    assert bias > 10 * error
    assert abs(left) < max(0.1 * bias, 3 * error)


def test_the_distance_is_the_plain_one() -> None:
    features, reference = sample(2, 300), (np.zeros(DIM), np.eye(DIM))
    found = estimate(moments_of(features), FrechetReference(*reference))
    plain = frechet_distance(features.double().mean(0), np.cov(features.double().numpy(), rowvar=False), *reference)
    assert found.distance == pytest.approx(plain, rel=1e-10)
    with pytest.raises(ValueError, match="at least 20 images, got 19"):
        estimate(moments_of(sample(3, 19)), FrechetReference(*reference))
