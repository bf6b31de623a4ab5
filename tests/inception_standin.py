"""Deterministic stand-in weights for the FID-Inception network, each tensor a function of its key alone."""

from __future__ import annotations

from functools import cache

from torch import Tensor

from tools.benchmark_evaluation import drawn_weights


@cache
def standin_state() -> dict[str, Tensor]:
    """The 566 tensors of a weights file, under its names. Shared between callers: copy before changing."""
    return drawn_weights()
