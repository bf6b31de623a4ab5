"""Where images come from: every kind of source is an iterable of records, and a record opens as a Pillow image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class Record:
    """One labelled image. `open` runs in a worker thread and raises DamagedImage or OSError where it cannot."""

    name: str
    label: int
    open: Callable[[], Image.Image]


class ImageSource(Protocol):
    """Records in a fixed order. `listing_hash` changes where the images, their order or their classes may have."""

    title: str
    class_names: list[str]
    listing_hash: str

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[Record]: ...


class IndexedSource:
    """Images that a file holds under numbers.

    Args:
        title: the path, for people.
        labels: int64 (N,), a class for each image.
        class_names: one name a class.
        stamp: JSON values that change when the file does.
        name: number -> what the image is called where it is damaged.
        open_image: number -> image; called from several threads.
    """

    def __init__(
        self,
        title: str,
        labels: np.ndarray,
        class_names: list[str],
        stamp: list[Any],
        name: Callable[[int], str],
        open_image: Callable[[int], Image.Image],
    ):
        self.title = title
        self.labels = labels
        self.class_names = class_names
        listing = [class_names, hashlib.sha256(labels.astype("<i8").tobytes()).hexdigest(), stamp]
        self.listing_hash = hashlib.sha256(json.dumps(listing).encode()).hexdigest()
        self._name, self._open = name, open_image

    def __len__(self) -> int:
        return len(self.labels)

    def __iter__(self) -> Iterator[Record]:
        for index in range(len(self.labels)):
            yield Record(self._name(index), int(self.labels[index]), partial(self._open, index))


def file_stamp(path: Path) -> str:
    """Text that changes when a file is written: its size and time."""
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"
