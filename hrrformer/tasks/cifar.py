"""The CIFAR-10 files as torchvision and the original site lay them out: pickles, opened without trusting them."""

from __future__ import annotations

import _codecs
import pickle
from pathlib import Path

import numpy as np

from runtime.errors import UserError

CIFAR_FOLDER = "cifar-10-batches-py"
BATCHES = {"train": [f"data_batch_{number}" for number in range(1, 6)], "test": ["test_batch"]}

# All that the pickle of a dict of arrays and lists may name; anything else could run a program.
_reconstruct = np.empty(0).__reduce__()[0]
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy._core.multiarray", "_reconstruct"): _reconstruct,
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _codecs.encode,
}


class _Unpickler(pickle.Unpickler):
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
        images, labels = content["data"], [int(label) for label in content["labels"]]
        if images.dtype != np.uint8 or images.shape != (len(labels), 3072) or not set(labels) <= set(range(10)):
            raise ValueError("not uint8 rows of 3072 values with labels 0 to 9")
    except OSError:
        raise
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        raise UserError(f"{file} is not a sound CIFAR-10 batch: {error}") from None
    return np.ascontiguousarray(images.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)), labels
