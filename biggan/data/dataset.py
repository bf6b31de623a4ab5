"""Labelled uint8 images with a data order that is a pure function of position and seed."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from runtime.hashing import hash64

_ORDER, _FLIP = 0, 1  # the two random streams of a seed


class ImageDataset:
    """Square RGB images, decoded once, in memory or over a memory map.

    Args:
        images: uint8 (N, 3, R, R).
        labels: int64 (N,), indices into `class_names`; None puts all images into one class.
        class_names: one name a class.
        source: where the images come from, for people.
        fingerprint: identifies images, order, labels and resize rule; the key of cached statistics.
        check: called before images are read; raises OSError where they cannot be read any more.

    Raises:
        ValueError: no images, wrong shapes or types, or labels without a class.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor | None = None,
        class_names: list[str] | None = None,
        source: str = "tensor",
        fingerprint: str = "",
        check: Callable[[], None] = lambda: None,
    ):
        if images.dtype != torch.uint8 or images.shape[1:] != (3, images.shape[-1], images.shape[-1]):
            raise ValueError(f"images must be uint8 (N, 3, R, R), got {images.dtype} {tuple(images.shape)}")
        if len(images) == 0:
            raise ValueError("a dataset needs at least one image")
        labels = torch.zeros(len(images), dtype=torch.int64) if labels is None else labels
        class_names = ["all"] if class_names is None else class_names
        if labels.dtype != torch.int64 or labels.shape != (len(images),):
            raise ValueError(f"labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}")
        if labels.min() < 0 or labels.max() >= len(class_names):
            raise ValueError(f"labels must lie in 0 .. {len(class_names) - 1}, the classes named")
        self.images = images
        self.labels = labels
        self.class_names = class_names
        self.source = source
        self.fingerprint = fingerprint
        self.check = check
        self._epoch_order: tuple[tuple[int, int], np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self.images)

    @property
    def resolution(self) -> int:
        return self.images.shape[-1]

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    def take(self, indices: torch.Tensor | np.ndarray | list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Images uint8 (B, 3, R, R), a contiguous copy, and labels int64 (B,) at the given indices."""
        self.check()
        indices = torch.as_tensor(indices, dtype=torch.int64)
        return self.images[indices], self.labels[indices]

    def batch(self, position: int, batch_size: int, seed: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples `position .. position + batch_size - 1` of the stream of `samples`."""
        return self.samples(np.arange(position, position + batch_size), seed, flip)

    def samples(self, positions: np.ndarray, seed: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples of an endless stream of shuffled epochs; only their images are read.

        A pure function of its arguments: the stream is the same however it is cut into batches, resumed, or dealt to
        processes. Every epoch is a new permutation.

        Args:
            positions: int64 (B,), places in the stream; sample i belongs to epoch i // N.
            seed: names the stream.
            flip: mirror each sample with probability 1/2, decided anew every time it is drawn.

        Returns:
            images uint8 (B, 3, R, R), contiguous; labels int64 (B,).
        """
        epochs, places = positions // len(self), positions % len(self)
        indices = np.empty(len(positions), dtype=np.int64)
        for epoch in np.unique(epochs):
            inside = epochs == epoch
            indices[inside] = self._order(seed, int(epoch))[places[inside]]
        images, labels = self.take(indices)
        if flip:
            mirrored = torch.from_numpy(hash64(seed, _FLIP, positions) >> np.uint64(63) == 1)  # (B,)
            images[mirrored] = images[mirrored].flip(-1)
        return images, labels

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """The permutation of an epoch, int64 (N,): the ranks of distinct random keys."""
        if self._epoch_order is None or self._epoch_order[0] != (seed, epoch):
            keys = hash64(seed, _ORDER, epoch, np.arange(len(self)))
            self._epoch_order = ((seed, epoch), np.argsort(keys, kind="stable"))
        return self._epoch_order[1]
