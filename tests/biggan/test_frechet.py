"""The Fréchet distance against its closed forms."""

import numpy as np
import pytest
import torch

from biggan.metrics.frechet import frechet_distance


def random_gaussian(seed: int, dim: int, samples: int) -> tuple[np.ndarray, np.ndarray]:
    features = np.random.RandomState(seed).standard_normal((samples, dim)) * np.linspace(0.1, 3, dim)
    return features.mean(axis=0), np.cov(features, rowvar=False)


def test_equal_covariances_leave_the_distance_of_the_means() -> None:
    mean, cov = random_gaussian(0, dim=24, samples=100)
    shift = np.linspace(-1, 2, 24)
    assert frechet_distance(mean, cov, mean + shift, cov) == pytest.approx((shift**2).sum(), rel=1e-12)


def test_diagonal_covariances() -> None:
    """Each axis is a distance of one-dimensional Gaussians, the difference of their standard deviations squared."""
    std1, std2 = np.linspace(0, 2, 9), np.linspace(3, 0, 9)  # each has a direction without variance
    distance = frechet_distance(np.zeros(9), np.diag(std1**2), np.zeros(9), np.diag(std2**2))
    assert distance == pytest.approx(((std1 - std2) ** 2).sum(), rel=1e-12)


def test_commuting_covariances() -> None:
    basis = np.linalg.qr(np.random.RandomState(1).standard_normal((9, 9)))[0]
    values1, values2 = np.linspace(0.5, 2, 9), np.linspace(3, 0.1, 9)
    distance = frechet_distance(np.zeros(9), basis * values1 @ basis.T, np.zeros(9), basis * values2 @ basis.T)
    assert distance == pytest.approx(((values1**0.5 - values2**0.5) ** 2).sum(), rel=1e-12)


@pytest.mark.parametrize("samples", [(200, 300), (60, 20), (12, 30), (2, 3)])
def test_fewer_samples_than_dimensions(samples: tuple[int, int]) -> None:
    """With centred data X, Y, tr (S1 S2)^½ is the nuclear norm of X Yᵀ / sqrt((n1 - 1)(n2 - 1)), at any rank."""
    random = np.random.RandomState(2)
    first, second = (random.standard_normal((count, 40)) for count in samples)
    first, second = first - first.mean(axis=0), second - second.mean(axis=0)
    scale = np.sqrt((samples[0] - 1) * (samples[1] - 1))
    trace_root = np.linalg.svd(first @ second.T, compute_uv=False).sum() / scale
    cov1, cov2 = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    expected = np.trace(cov1) + np.trace(cov2) - 2 * trace_root
    assert frechet_distance(np.zeros(40), cov1, np.zeros(40), cov2) == pytest.approx(expected, rel=1e-11)


def test_identical_gaussians_are_at_distance_zero() -> None:
    mean, cov = random_gaussian(3, dim=64, samples=30)
    assert abs(frechet_distance(mean, cov, mean, cov)) < 1e-12 * np.trace(cov)


def test_symmetric_and_independent_of_the_array_library() -> None:
    first, second = random_gaussian(4, dim=16, samples=50), random_gaussian(5, dim=16, samples=70)
    distance = frechet_distance(*first, *second)
    assert frechet_distance(*second, *first) == pytest.approx(distance, rel=1e-12)
    assert frechet_distance(*map(torch.from_numpy, first), *second) == distance


def test_points() -> None:
    zero = np.zeros((3, 3))
    assert frechet_distance(np.zeros(3), zero, np.ones(3), zero) == 3
    assert frechet_distance(np.zeros(3), zero, np.zeros(3), np.eye(3)) == 3


def test_wrong_arguments_raise() -> None:
    with pytest.raises(ValueError, match="one dim"):
        frechet_distance(np.zeros(3), np.eye(3), np.zeros(4), np.eye(4))
    with pytest.raises(ValueError, match="not finite"):
        frechet_distance(np.zeros(3), np.eye(3), np.full(3, np.nan), np.eye(3))


def test_many_small_eigenvalues_are_not_lost_in_rounding():
    """Fewer samples than dimensions and a steep spectrum, as features have; truth from the samples themselves."""
    rng, count, dim = np.random.default_rng(0), 200, 256
    scale = np.geomspace(1, 1e-9, dim)
    samples = [rng.standard_normal((count, dim)) * scale for _ in range(2)]
    first, second = (x - x.mean(0) for x in samples)
    # tr (S1 S2)^1/2 is the nuclear norm of the product of the centred samples: no root is taken, no rank is lost.
    trace_root = np.linalg.svd(first @ second.T, compute_uv=False).sum() / (count - 1)
    traces = (np.square(first).sum() + np.square(second).sum()) / (count - 1)
    expected = np.square(samples[0].mean(0) - samples[1].mean(0)).sum() + traces - 2 * trace_root
    moments = [part for x in samples for part in (x.mean(0), np.cov(x, rowvar=False))]
    assert frechet_distance(*moments) == pytest.approx(expected, rel=1e-6)
