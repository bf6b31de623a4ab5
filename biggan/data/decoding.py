"""All images of a source, decoded in threads and given in its order; damaged ones are collected until they are many."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice

import numpy as np

from biggan.data.decode import DamagedImage, square_rgb
from biggan.data.records import ImageSource, Record
from runtime.errors import UserError
from runtime.progress import track

MAX_DAMAGED_FRACTION = 0.05
_CHUNK = 32  # images a task: the overhead of a task spread over enough work
_NAMED = 10  # damaged images named in a message


class TooManyDamaged(UserError):
    """More damaged images than are allowed."""


class Damaged:
    """The damaged images of a source.

    Args:
        max_fraction: more of them than this end the decoding. A few are forgiven in small sets: up to ten, if at least
            two thirds are sound. 0 accepts none at all.
        found: those of an earlier, interrupted decoding.

    Raises:
        TooManyDamaged: these are too many.
    """

    def __init__(self, source: ImageSource, max_fraction: float, found: Iterable[str] = ()):
        self.found: list[str] = []
        self._total, self._title = len(source), source.title
        total = self._total
        self._allowed = max(int(max_fraction * total), min(10, total // 3)) if max_fraction > 0 else 0
        for name in found:
            self.add(name)

    def add(self, name: str) -> None:
        """Raises TooManyDamaged as soon as it is certain that there are too many."""
        self.found.append(name)
        if len(self.found) > self._allowed or len(self.found) == self._total:
            raise TooManyDamaged(
                f"too many damaged images among the {self._total:,} in {self._title}: {_some(self.found)}"
            )

    def warn(self) -> None:
        if self.found:
            message = f"left out {len(self.found)} damaged of {self._total:,} images in {self._title}"
            warnings.warn(f"{message}: {_some(self.found)}", stacklevel=2)


def decoded(
    source: ImageSource, resolution: int, workers: int | None, progress: bool, damaged: Damaged, first: int = 0
) -> Iterator[tuple[np.ndarray, int]]:
    """Pairs of uint8 (3, R, R) and label, from record `first` on, in the order of the source.

    Damaged images are added to `damaged`, in order too: when an image is given, all damaged ones before it are there.
    They are named in a warning at the end.

    Raises:
        TooManyDamaged: as soon as that is certain.
    """
    results = _decode_in_order(source, resolution, workers or os.cpu_count() or 1, first)
    for record, image in track(results, len(source) - first, f"decoding {source.title}", progress):
        if isinstance(image, np.ndarray):
            yield image, record.label
        else:
            damaged.add(f"{record.name} ({image})")
    damaged.warn()


def _decode_in_order(
    source: ImageSource, resolution: int, workers: int, first: int
) -> Iterator[tuple[Record, np.ndarray | Exception]]:
    """Decodes in threads (Pillow releases the interpreter lock), a bounded number of chunks ahead of the consumer."""

    def decode(records: list[Record]) -> list[tuple[Record, np.ndarray | Exception]]:
        return [(record, _decode(record, resolution)) for record in records]

    records = islice(source, first, None)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        while chunk := list(islice(records, _CHUNK)):
            ahead.append(pool.submit(decode, chunk))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _decode(record: Record, resolution: int) -> np.ndarray | Exception:
    try:
        return square_rgb(record.open(), resolution)
    except (DamagedImage, OSError) as error:
        return error


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
