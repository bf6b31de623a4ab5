"""Which examples make a batch and how long it is padded: a pure function of the step and a seed.

With bucket lengths, examples of similar length come together and a batch is padded to one of these few lengths, so that
programs compiled for a shape see few shapes and little of the work is padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from runtime.hashing import hash64

_KEEP, _ORDER, _BATCHES = 0, 1, 2  # the random streams of a seed


class BatchSchedule:
    """Batches of one size, epoch after epoch; every epoch is a new permutation.

    The examples that do not fill a last batch sit an epoch out: others each time.

    Args:
        lengths: of the examples, int (N,) or (N, inputs).
        batch_size: examples a batch, over all processes; a process takes its share of the indices.
        max_length: where the longest batches are padded (or cut) to.
        bucket_lengths: shorter lengths to pad to; () pads every batch to `max_length`.

    Raises:
        ValueError: fewer examples than a batch, or a bucket length outside 1 .. max_length.
    """

    def __init__(
        self, lengths: np.ndarray, batch_size: int, max_length: int, seed: int, bucket_lengths: Sequence[int] = ()
    ):
        if not 1 <= batch_size <= len(lengths):
            raise ValueError(f"batches of {batch_size} cannot be made of {len(lengths)} examples")
        self.padded_lengths = _padded_lengths(lengths, max_length, bucket_lengths)  # (N,)
        self.batch_size = batch_size
        self.seed = seed
        self._plan: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.padded_lengths) // self.batch_size

    def batch(self, step: int) -> tuple[np.ndarray, int]:
        """The indices int64 (batch_size,) of step 0, 1, ... and the length to pad them to."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._plan is None or self._plan[0] != epoch:
            self._plan = (epoch, self._batches(epoch))
        indices = self._plan[1][place]
        return indices, int(self.padded_lengths[indices].max())

    def _batches(self, epoch: int) -> np.ndarray:
        """The batches of an epoch, int64 (steps_per_epoch, batch_size)."""
        examples = np.arange(len(self.padded_lengths))
        kept = np.argsort(hash64(self.seed, _KEEP, epoch, examples), kind="stable")
        kept = kept[: self.steps_per_epoch * self.batch_size]
        # Sorted by bucket, shuffled within: a batch across the border of two buckets is padded to the longer one.
        order = np.lexsort((hash64(self.seed, _ORDER, epoch, kept), self.padded_lengths[kept]))
        batches = kept[order].reshape(-1, self.batch_size)
        return batches[np.argsort(hash64(self.seed, _BATCHES, epoch, np.arange(len(batches))), kind="stable")]


def evaluation_batches(
    lengths: np.ndarray, batch_size: int, max_length: int, bucket_lengths: Sequence[int] = ()
) -> Iterator[tuple[np.ndarray, int, np.ndarray]]:
    """Covers each example once, from short to long where there are buckets.

    Yields:
        indices int64 (batch_size,), the length to pad to, and bool (batch_size,): False marks the repetitions that
        fill the last batch, which are not to be counted.

    Raises:
        ValueError: as BatchSchedule.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    padded_lengths = _padded_lengths(lengths, max_length, bucket_lengths)
    order = np.argsort(padded_lengths, kind="stable")
    for start in range(0, len(order), batch_size):
        indices = order[start : start + batch_size]
        valid = np.arange(batch_size) < len(indices)
        yield np.resize(indices, batch_size), int(padded_lengths[indices].max()), valid


def _padded_lengths(lengths: np.ndarray, max_length: int, bucket_lengths: Sequence[int]) -> np.ndarray:
    """int64 (N,): the smallest bucket that holds the longest input of each example, or `max_length`."""
    if any(not 1 <= length <= max_length for length in bucket_lengths):
        raise ValueError(f"bucket lengths must lie in 1 .. {max_length}, got {', '.join(map(str, bucket_lengths))}")
    longest = np.minimum(np.asarray(lengths).reshape(len(lengths), -1).max(1), max_length)
    ends = np.unique(np.append(np.asarray(bucket_lengths, dtype=np.int64), max_length))
    return ends[np.searchsorted(ends, longest)]
