"""What `tools.benchmark_evaluation` compares, and when it calls two numbers equal."""

from pathlib import Path

import numpy as np
import pytest
import torch
from inception_standin import standin_state

from biggan.metrics.inception_weights import load_inception
from tools import benchmark_evaluation
from tools.benchmark_evaluation import compare, our_metrics
from tools.evaluation_tools import features_file


def test_numbers_are_compared_by_their_bounds() -> None:
    theirs = {"frechet_inception_distance": 2.0, "kernel_inception_distance_mean": 1e-4, "precision": 0.5, "f_score": 1}
    ours = {"fid": 2.0019, "kid": 1.02e-4, "precision": 0.5001, "is": 3.0}
    found = compare(theirs, ours)
    assert {name: entry["within"] for name, entry in found.items()} == {"fid": True, "kid": False, "precision": True}
    assert found["fid"]["relative_difference"] == pytest.approx(0.00095)
    assert compare({"fid": 2.0}, {"fid": 2.01})["fid"]["within"] is False


def test_our_metrics_are_of_the_first_images(tmp_path: Path) -> None:
    torch.save(standin_state(), tmp_path / "weights.pth")
    random = np.random.RandomState(0)
    for side in benchmark_evaluation.SIDES:
        features_file(tmp_path, "ours-tensorflow", side, 2048)[:12] = random.random((12, 2048))
    found = our_metrics(tmp_path, "ours-tensorflow", 10, load_inception(tmp_path / "weights.pth"))
    assert {"fid", "kid", "is", "precision", "recall"} <= found.keys() and found["fid"] > 0
    assert np.isfinite(list(found.values())).all()
    changed = features_file(tmp_path, "ours-tensorflow", "real", 2048)
    changed[10:] = 0  # beyond the first ten
    changed.flush()
    assert our_metrics(tmp_path, "ours-tensorflow", 10, load_inception(tmp_path / "weights.pth")) == found
