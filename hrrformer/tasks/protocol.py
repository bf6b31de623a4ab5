"""What a task is, and what its readers and generators return."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Example = tuple[tuple[bytes, ...], int]
"""The symbols of each input, one byte a token, and the label. The token's id is its byte plus `Task.first_id`."""


@dataclass(frozen=True)
class Source:
    """A data set that was found and listed, and not yet read.

    Args:
        title: where it is, for people.
        stamp: text that changes whenever the examples may have.
        class_names: one name a label.
        sizes: {split: number of examples}, of "train", "validation" and "test"; "train" is always there. The number
            may be a little too high: examples that a reader leaves out are counted.
        read: (split, worker processes) -> its examples, always in the same order.
    """

    title: str
    stamp: str
    class_names: tuple[str, ...]
    sizes: dict[str, int]
    read: Callable[[str, int], Iterator[Example]]


@dataclass(frozen=True)
class Task:
    """A benchmark task.

    Args:
        title: a few words for people.
        vocab_size: token ids lie in 0 .. vocab_size - 1; 0 is padding where `uses_mask`.
        first_id: the id of symbol 0; 1 where symbols are bytes that leave 0 to the padding.
        max_length: of the benchmark, in tokens.
        class_names: of the benchmark's labels.
        uses_mask: lengths differ, and padding is to be masked. Otherwise every example fills the length exactly.
        inputs: sequences an example; 2 for pairs of documents.
        where: which files are read, and where to get them.
        open: (path, max_length) -> Source of the official files.
        generate: (max_length, seed) -> Source of a small set made here; None where that cannot be.
        version: of reader and generator; a new one makes packed files of older ones void.
    """

    name: str
    title: str
    vocab_size: int
    first_id: int
    max_length: int
    class_names: tuple[str, ...]
    uses_mask: bool
    where: str
    open: Callable[[Path, int], Source]
    generate: Callable[[int, int], Source] | None = None
    inputs: int = 1
    version: int = 1

    @property
    def num_classes(self) -> int:
        return len(self.class_names)
