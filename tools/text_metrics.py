"""The metrics that GLUE defines (Wang et al. 2019, https://arxiv.org/abs/1804.07461, section 4), in percent."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from scipy import stats


def accuracy(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Share of right classes."""
    return float(np.mean(predicted == labels))


def f1(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Harmonic mean of precision and recall of class 1; 0 where it is neither predicted nor there."""
    hits = np.sum((predicted == 1) & (labels == 1))
    return float(2 * hits / max(np.sum(predicted == 1) + np.sum(labels == 1), 1))


def matthews(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation of two classes: their Pearson correlation; 0 where either side has one class only."""
    return pearson(predicted == 1, labels == 1)


def pearson(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation; 0 where either side is constant."""
    x, y = (np.asarray(values, np.float64) - np.mean(values) for values in (predicted, labels))
    norm = np.sqrt(np.sum(x * x) * np.sum(y * y))
    return float(np.sum(x * y) / norm) if norm > 0 else 0.0


def spearman(predicted: np.ndarray, labels: np.ndarray) -> float:
    """Pearson correlation of ranks; equal values share their mean rank."""
    return pearson(stats.rankdata(predicted), stats.rankdata(labels))


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    function.__name__: function for function in (accuracy, f1, matthews, pearson, spearman)
}


def score(names: Sequence[str], outputs: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Metrics of a model's outputs (N, classes), or (N, 1) for a regression, against labels (N,)."""
    predicted = outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(axis=1)
    return {name: 100 * METRICS[name](predicted, labels) for name in names}
