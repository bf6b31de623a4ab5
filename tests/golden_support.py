"""Where the recordings of the original implementations are, and how near ours must come to them.

The folder is GOLDEN_DIR, or `../shared/golden` beside the repository. Files are found by name pattern, and what a file
does not hold is not compared, so that other recordings of the same form, or some of them, can be put in its place.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

GOLDEN_DIR = Path(os.environ.get("GOLDEN_DIR", Path(__file__).resolve().parents[2] / "shared" / "golden"))

# Largest error, relative to the largest entry of the recorded tensor (or to 1 where that is less), unless it says more.
TOLERANCES = {
    "smyrf_output": 2e-5,
    "smyrf_gradient": 2e-4,
    "hrr_output": 1e-5,
    "hrr_gradient": 1e-4,
    "hrrformer_output": 2e-5,
    "hrrformer_gradient": 2e-5,
    "hrrformer_six_steps": 1e-5,
    "hrrformer_schedule": 1e-7,
    "gan_outputs": 1e-4,
    "gan_buffers": 1e-5,
    "gan_clusters": 1e-2,  # share of tokens in another cluster than recorded: ties at cluster boundaries
    "losses": 1e-5,
    "train_losses": 1e-5,
    "train_gradients": 1e-5,
    "train_first_step": 1e-5,
    "train_third_iteration": 2e-5,  # what a float64 run differs by
    "moments": 1e-12,
    "fid": 1e-6,  # relative to the distance
    "inception": 1e-3,  # absolute: features and logits are of order 1
    "resize": 1e-3,  # absolute, of pixels in 0..255
}


def recordings(*patterns: str) -> pytest.MarkDecorator:
    """Parametrises a test by `path` over the files of these patterns; skips it where there are none."""
    paths: Sequence[Path] = sorted(path for pattern in patterns for path in GOLDEN_DIR.glob(pattern))
    return pytest.mark.parametrize("path", paths, ids=[path.stem for path in paths])


@cache
def load(path: Path) -> dict[str, np.ndarray]:
    with np.load(path) as file:
        return {key: file[key] for key in file.files}


def assert_close(
    name: str, ours: Tensor | np.ndarray, recorded: Tensor | np.ndarray, tolerance: str, scale: float | None = None
) -> None:
    """`scale`: what the error is relative to; None is the largest recorded entry, at least 1."""
    ours, recorded = torch.as_tensor(ours).detach(), torch.as_tensor(recorded)
    assert ours.shape == recorded.shape, f"{name}: {tuple(ours.shape)}, recorded {tuple(recorded.shape)}"
    scale = max(1.0, recorded.abs().max().item()) if scale is None else scale
    error = (ours.double() - recorded.double()).abs().max().item() / scale
    assert error <= TOLERANCES[tolerance], f"{name}: {error:.2e} > {TOLERANCES[tolerance]:.0e} ({tolerance})"
