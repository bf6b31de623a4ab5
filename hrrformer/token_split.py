"""One split of a task: token sequences over a memory map."""

from __future__ import annotations

import numpy as np
import torch

from hrrformer.packed import PackedSplit


class TokenSplit:
    """Labelled token sequences, one split of a task.

    `labels` is int64 (N,) and `lengths` int64 (N, inputs): tokens of each sequence, at most the task's max_length.

    Args:
        packed: the mapped sequences.
        members: int64 (N,), which of them belong to this split.
        first_id: the id of symbol 0.
        max_length: longer sequences are cut to it.
        fingerprint: identifies the sequences, their order and their labels.
    """

    def __init__(
        self,
        packed: PackedSplit,
        members: np.ndarray,
        *,
        first_id: int,
        max_length: int,
        class_names: tuple[str, ...],
        fingerprint: str,
    ):
        ends = np.cumsum(packed.lengths.reshape(-1)).reshape(packed.lengths.shape)  # (all, inputs)
        self.lengths = np.minimum(packed.lengths[members], max_length)  # (N, inputs)
        self.labels = torch.from_numpy(packed.labels[members])
        self.class_names = class_names
        self.fingerprint = fingerprint
        self._starts = (ends - packed.lengths)[members]
        self._symbols = packed.symbols
        self._first_id = first_id

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def inputs(self) -> int:
        return self.lengths.shape[1]

    def rows(self, indices: np.ndarray | torch.Tensor, length: int) -> torch.Tensor:
        """The token ids of some examples, cut at `length` and filled up to it with 0.

        Args:
            indices: int (B,).

        Returns:
            int64 (B, length), or (B, inputs, length) where an example has several inputs.
        """
        indices = np.asarray(indices)
        starts = self._starts[indices].reshape(-1)  # (B * inputs,)
        lengths = np.minimum(self.lengths[indices], length).reshape(-1)
        symbols = np.zeros((len(starts), length), dtype=np.uint8)
        for row, start, count in zip(symbols, starts.tolist(), lengths.tolist(), strict=True):  # one memcpy a sequence
            row[:count] = self._symbols[start : start + count]
        tokens = torch.from_numpy(symbols).long()
        if self._first_id:
            there = torch.arange(length) < torch.from_numpy(lengths)[:, None]
            tokens = (tokens + self._first_id) * there
        return tokens if self.inputs == 1 else tokens.view(len(indices), self.inputs, length)
