"""Kernel distance, Inception Score, precision, recall, density and coverage against loops over single images."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from biggan.metrics import prdc
from biggan.metrics.inception_score import InceptionScore
from biggan.metrics.kid import default_subset_size, kernel_distances, squared_mmd, standard_error
from biggan.metrics.prdc import precision_recall_density_coverage


def features(seed: int, count: int, dim: int = 5, shift: float = 0.0) -> torch.Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)) + shift


def naive_squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1) ** 3

    within = [np.mean([kernel(s[i], s[j]) for i, j in itertools.permutations(range(len(s)), 2)]) for s in (x, y)]
    return sum(within) - 2 * np.mean([kernel(a, b) for a in x for b in y])


def test_kernel_distance_of_one_pair_of_subsets() -> None:
    x, y = features(0, 9), features(1, 9, shift=0.3)
    expected = naive_squared_mmd(x.double().numpy(), y.double().numpy())
    assert squared_mmd(x.double(), y.double()).item() == pytest.approx(expected, rel=1e-12)


def test_subsets_are_those_of_torch_fidelity() -> None:
    """Drawn from RandomState(2020), generated first, without replacement."""
    generated, real = features(2, 20), features(3, 30)
    random = np.random.RandomState(2020)
    expected = []
    for _ in range(4):
        x = generated[random.choice(20, 8, replace=False)].double().numpy()
        y = real[random.choice(30, 8, replace=False)].double().numpy()
        expected.append(naive_squared_mmd(x, y))
    np.testing.assert_allclose(kernel_distances(generated, real, 8, 4), expected, rtol=1e-10)


def test_the_kernel_distance_of_one_distribution_is_zero_on_average() -> None:
    values = [kernel_distances(features(2 * s, 40), features(2 * s + 1, 40), 40, 1)[0] for s in range(60)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(60)
    assert kernel_distances(features(0, 40), features(1, 40, shift=1), 40, 1)[0] > 5 * np.std(values)


def test_the_standard_error_is_what_repetition_shows() -> None:
    means, errors = [], []
    for seed in range(40):
        distances = kernel_distances(features(2 * seed, 100), features(2 * seed + 1, 100, shift=0.5), 30, 20)
        means.append(distances.mean())
        errors.append(standard_error(distances, 30, 100))
    assert np.mean(errors) == pytest.approx(np.std(means), rel=0.3)
    assert math.isnan(standard_error(distances, 100, 100))


def test_subsets_that_cannot_be_drawn_raise() -> None:
    assert [default_subset_size(count) for count in (2, 100, 50_000)] == [2, 50, 1000]
    for size, number in ((1, 1), (11, 1), (5, 0)):
        with pytest.raises(ValueError, match=r"1 or more subsets of 2 \.\. 10"):
            kernel_distances(features(0, 10), features(1, 20), size, number)


def naive_inception_scores(logits: np.ndarray, splits: int) -> list[float]:
    logits = logits[np.random.RandomState(2020).permutation(len(logits))]
    scores = []
    for split in range(splits):
        rows = logits[split * len(logits) // splits : (split + 1) * len(logits) // splits]
        p = np.exp(rows) / np.exp(rows).sum(axis=1, keepdims=True)
        scores.append(math.exp(np.mean([np.sum(row * np.log(row / p.mean(axis=0))) for row in p])))
    return scores


@pytest.mark.parametrize(("count", "splits"), [(40, 4), (43, 10), (5, 5)])
def test_inception_score(count: int, splits: int) -> None:
    logits = features(4, count, dim=7).double()
    score = InceptionScore(count, 7, splits)
    for batch in logits.split(6):
        score.update(batch)
    np.testing.assert_allclose(score.scores(), naive_inception_scores(logits.numpy(), splits), rtol=1e-12)


def test_inception_score_of_extremes() -> None:
    """One class each: as many as there are classes. The same distribution for all: 1."""
    certain = InceptionScore(8, 4, splits=1)
    certain.update(1e4 * torch.eye(4).repeat(2, 1))
    assert certain.scores().item() == pytest.approx(4, rel=1e-12)
    alike = InceptionScore(8, 4, splits=2)
    alike.update(torch.arange(4.0).expand(8, 4))
    np.testing.assert_allclose(alike.scores(), 1, rtol=1e-12)
    with pytest.raises(ValueError, match="expected 1 .. 8 splits"):
        InceptionScore(8, 4, splits=9)


def naive_prdc(generated: np.ndarray, real: np.ndarray) -> dict[str, float]:
    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.sqrt(((a - b) ** 2).sum()))

    def radii(points: np.ndarray, k: int) -> list[float]:
        return [sorted(distance(p, q) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    def inside(point: np.ndarray, centres: np.ndarray, reach: list[float]) -> list[bool]:
        return [distance(point, centre) <= r for centre, r in zip(centres, reach, strict=True)]

    balls = np.array([inside(point, real, radii(real, 5)) for point in generated])
    return {
        "precision": np.mean([any(inside(point, real, radii(real, 3))) for point in generated]),
        "recall": np.mean([any(inside(point, generated, radii(generated, 3))) for point in real]),
        "density": balls.sum() / (5 * len(generated)),
        "coverage": balls.any(axis=0).mean(),
    }


@pytest.mark.parametrize(("shift", "chunk"), [(0.0, 1 << 20), (0.7, 100)])
def test_precision_recall_density_coverage(shift: float, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prdc, "CHUNK_VALUES", chunk)
    generated, real = features(5, 24, shift=shift), features(6, 31)
    expected = naive_prdc(generated.double().numpy(), real.double().numpy())
    assert precision_recall_density_coverage(generated, real) == pytest.approx(expected, abs=1e-12)
    assert 0 < expected["coverage"] < 1 or shift == 0


def test_prdc_of_equal_and_of_distant_sets() -> None:
    points = features(7, 30)
    same, apart = (precision_recall_density_coverage(points + shift, points) for shift in (0.0, 100.0))
    assert (same["precision"], same["recall"], same["coverage"]) == (1, 1, 1)
    assert list(apart.values()) == [0, 0, 0, 0]
    with pytest.raises(ValueError, match="more than 5 points"):
        precision_recall_density_coverage(points[:5], points)
