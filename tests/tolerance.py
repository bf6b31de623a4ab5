"""Tolerances scaled to the arithmetic.

Two rules, never loosened case by case:

- `assert_close`: both sides compute the same thing in the same precision. They may differ by rounding, relative to the
  largest entry, by TOLERANCE of the dtype.
- `assert_no_worse`: a low-precision or fast form against the truth, computed in float64. Its error is at most twice
  that of the plain form in the same precision, plus one rounding step of the largest entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}


def max_error(value: Tensor, truth: Tensor) -> float:
    """Largest absolute difference, in float64; NaN where either side holds one."""
    assert value.shape == truth.shape, f"shapes differ: {tuple(value.shape)} and {tuple(truth.shape)}"
    return (value.detach().double() - truth.detach().double()).abs().max().item()


def scale_of(truth: Tensor) -> float:
    """Largest absolute entry; 1 where all are zero."""
    return truth.detach().abs().max().item() or 1.0


def assert_close(value: Tensor, truth: Tensor, tolerance: float | None = None) -> None:
    """|value - truth| <= tolerance * max|truth|, by default the TOLERANCE of value's dtype."""
    tolerance = TOLERANCE[value.dtype] if tolerance is None else tolerance
    error = max_error(value, truth) / scale_of(truth)
    assert error <= tolerance, f"relative error {error:.2e}, allowed {tolerance:.2e}"


def assert_no_worse(ours: Tensor, plain: Tensor, truth: Tensor) -> None:
    """err(ours) <= 2 * err(plain) + one rounding step, errors against a truth in float64."""
    assert ours.dtype == plain.dtype and truth.dtype == torch.float64
    floor = torch.finfo(ours.dtype).eps * scale_of(truth)
    ours_error, plain_error = max_error(ours, truth), max_error(plain, truth)
    assert ours_error <= 2 * plain_error + floor, f"error {ours_error:.2e}, plain {plain_error:.2e} + {floor:.2e}"
