"""Features of batches of images, computed by all devices and processes together, and rows of them kept on disk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from biggan.metrics.networks import FeatureNetwork
from runtime.device import Device


class FeatureExtractor:
    """A feature network on a device.

    Attributes:
        network, resize_rule: what the features depend on.
        has_logits: whether `extract` also gives logits, which the Inception Score takes.
        sums_device: where sums over features are to be kept: the device itself, or the host of one without float64.
    """

    def __init__(self, network: FeatureNetwork, resize_rule: str, device: Device) -> None:
        self.network, self.resize_rule, self.device = network, resize_rule, device
        self.has_logits = hasattr(network, "logits")
        self.sums_device = torch.device("cpu") if device.kind == "xla" else device.torch_device
        device.put_network(network, torch.channels_last if device.channels_last else torch.contiguous_format)
        self._extract = device.compile_step(self._extract_all_rows)
        self._batch_size = 0  # the largest so far

    def extract(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """Features (B, dim) and logits (B, classes) of uint8 images (B, 3, R, R), which the processes share.

        Each process reads its own images only, and gets the features of all. The last image is repeated until they can
        share evenly, and up to the largest batch so far where each size costs a compilation.
        """
        count, device = len(images), self.device
        size = max(self._batch_size, count) if device.compiles_each_shape else count
        self._batch_size = size + -size % device.num_shards
        own = images[device.local_rows(self._batch_size).clamp(max=count - 1).to(images.device)]
        outputs = self._extract(device.put(own.cpu(), batch_dim=0, local=True))
        features, logits = (None if part is None else part.to(self.sums_device)[:count] for part in outputs)
        return features, logits

    def _extract_all_rows(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        features = self.network(images, self.resize_rule)
        logits = self.network.logits(features, bias=False) if self.has_logits else None
        return tuple(None if part is None else self.device.all_rows(part) for part in (features, logits))


class Rows:
    """An array filled row by row, in a file that is mapped, or in memory where there is no folder.

    Attributes:
        filled: rows that were given.
        array: (num_rows, *shape); those not yet given hold anything.
    """

    def __init__(self, path: Path | None, num_rows: int, shape: tuple[int, ...], dtype: type) -> None:
        self.path, self.filled = path, 0
        full_shape = (num_rows, *shape)
        if path is None:
            self.array = np.empty(full_shape, dtype)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if not holds(path, full_shape, dtype):
            np.lib.format.open_memmap(path, "w+", dtype, full_shape)
        self.array = np.lib.format.open_memmap(path, "r+")

    def update(self, rows: Tensor) -> None:
        self.array[self.filled : self.filled + len(rows)] = rows.cpu().numpy()
        self.filled += len(rows)

    def tensor(self) -> Tensor:
        """The filled rows, not copied."""
        return torch.from_numpy(self.array[: self.filled])

    def state_dict(self) -> dict[str, int]:
        """What was given so far is in the file when this returns."""
        if isinstance(self.array, np.memmap):
            self.array.flush()
        return {"filled": self.filled}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.filled = int(state["filled"])


def holds(path: Path, shape: tuple[int, ...], dtype: type) -> bool:
    """Whether there is such an array in an .npy file."""
    try:
        found = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):  # none, or cut short
        return False
    return found.shape == shape and found.dtype == dtype
