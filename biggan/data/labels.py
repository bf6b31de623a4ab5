"""The labels that a file gives its images, checked once for all formats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from runtime.errors import UserError

_MAX_CLASSES = 1 << 20  # a name is made for each, so that a broken label must not ask for 2^63 of them


def checked_labels(values: Any, where: str, class_names: Sequence[str] | None = None) -> tuple[np.ndarray, list[str]]:
    """int64 (N,) labels and the names of their classes: "0", "1", ... up to the largest label where none are given.

    -1 throughout is how unlabelled splits are stored on the Hugging Face hub: they are one class, called "all".

    Args:
        values: one whole number an image, a sequence or array.
        where: what holds them, for messages.

    Raises:
        UserError: other values, or one without a class.
    """
    labels = np.asarray(values)
    if labels.ndim != 1 or labels.dtype.kind not in "iu":
        raise UserError(f"{where} must be one whole number an image, not {labels.dtype} {labels.shape}")
    if (labels == -1).all():
        return no_labels(len(labels))
    low, high = int(labels.min()), int(labels.max())
    count = len(class_names) if class_names is not None else _MAX_CLASSES
    if low < 0 or high >= count:
        raise UserError(f"{where} must lie in 0 .. {count - 1}; found {low} .. {high}")
    return labels.astype(np.int64), list(class_names or map(str, range(high + 1)))


def no_labels(count: int) -> tuple[np.ndarray, list[str]]:
    """All images in one class."""
    return np.zeros(count, dtype=np.int64), ["all"]
