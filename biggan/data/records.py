"""Where images come from: every kind of source is an iterable of records, and a record opens as a Pillow image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

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
