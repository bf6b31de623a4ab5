"""The CIFAR-10 files as torchvision and the original site lay them out: pickles, opened without trusting them."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np

from runtime.errors import UserError

CIFAR_FOLDER = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}


class _Dtype:
    """Stands for numpy's, which takes flags from a pickle that make it read any bytes as pointers to objects."""

    def __init__(self, name: str, *_: Any) -> None:
        if name != "u1":
            raise pickle.UnpicklingError(f"it holds an array of {name}, not uint8 rows of 3072 values")

    def __setstate__(self, state: tuple) -> None:
        """Byte order and the like, which bytes do not have."""


class _Array:
    """Stands for numpy's, with bytes as its only numbers."""

    def __init__(self, *_: Any) -> None:
        self.values = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple) -> None:
        _, shape, _, by_columns, data = state
        if not isinstance(data, bytes) or len(data) != math.prod(shape):
            raise pickle.UnpicklingError("an array that is not of its size")
        self.values = np.frombuffer(data, np.uint8).reshape(shape, order="F" if by_columns else "C")


def _encode(text: str, encoding: str) -> bytes:
    """How pickles of protocol 2 hold bytes."""
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"unexpected encoding {encoding}")
    return text.encode(encoding)


# All that the pickle of a dict of arrays and lists may name; anything else could run a program.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}


class _Unpickler(pickle._Unpickler):
    """In Python: the one in C fills as much memory as the number of a memo says."""

    def find_class(self, module: str, name: str) -> object:
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which no such file needs")
        return _ALLOWED[module, name]


def read_batch(file: Path) -> tuple[np.ndarray, list[int]]:
    """Images uint8 (n, 32, 32, 3) and labels of one file.

    Raises:
        UserError: damaged, not such a file, or one that would run code.
    """
    try:
        with file.open("rb") as opened:
            content = _Unpickler(opened, encoding="bytes").load()
        content = {key.decode() if isinstance(key, bytes) else key: value for key, value in content.items()}
        images, labels = content["data"].values, content["labels"]
        if images.shape != (len(labels), 3072) or not all(type(label) is int and 0 <= label < 10 for label in labels):
            raise ValueError("not uint8 rows of 3072 values with labels 0 to 9")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"{file} is not a sound CIFAR-10 batch: {error}") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
