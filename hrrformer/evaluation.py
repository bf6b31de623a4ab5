"""Accuracy, loss and confusion matrix of a classifier on a split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hrrformer.batching import evaluation_batches
from hrrformer.data import TokenSplit
from hrrformer.learner import compile_by_shape
from hrrformer.model import SequenceClassifier
from runtime.device import Device
from runtime.distributed import parts_of_batch
from runtime.prefetch import prefetch
from runtime.progress import track


@dataclass(frozen=True)
class Evaluation:
    """Args:
    confusion: int64 (C, C), examples by true class (rows) and predicted class (columns), of C outputs.
    loss: mean negative log-likelihood of the labels.
    seconds: that it took, compilation included.
    """

    confusion: Tensor
    loss: float
    seconds: float

    @property
    def examples(self) -> int:
        return int(self.confusion.sum())

    @property
    def accuracy(self) -> float:
        return float(self.confusion.diagonal().sum()) / self.examples

    @property
    def class_accuracies(self) -> list[float | None]:
        """Of each class, the share of its examples that were recognised; None of a class without any."""
        pairs = zip(self.confusion.diagonal().tolist(), self.confusion.sum(1).tolist(), strict=True)
        return [right / number if number else None for right, number in pairs]


def majority_baseline(labels: Tensor) -> tuple[float, int]:
    """The accuracy of always answering the commonest class, and that class."""
    counts = labels.bincount()
    return float(counts.max()) / len(labels), int(counts.argmax())


class Evaluator:
    """Measures a classifier; compiled once for each length of batches, however often it is called.

    Args:
        batch_size: examples at once, a multiple of the device's shards.
        bucket_lengths: as BatchSchedule's.
    """

    def __init__(
        self,
        classifier: SequenceClassifier,
        device: Device,
        batch_size: int,
        bucket_lengths: Sequence[int] = (),
        precision: str = "float32",
        compiled: bool = False,
    ) -> None:
        self.classifier, self.device, self.precision = classifier, device, precision
        self.batch_size, self.bucket_lengths = batch_size, bucket_lengths
        self._compute = device.compile_network(classifier) if compiled else classifier
        self._step = compile_by_shape(device, self._count)

    def __call__(self, split: TokenSplit, limit: int = 0, progress: bool = False) -> Evaluation:
        """Looks at every example of the split once, or at `limit` of them; shows the way where `progress`.

        These are spread over the split: files may have one class after the other.

        Processes share each batch: all must call this, and all get the whole.
        """
        outputs, start = self.classifier.config.num_outputs, time.monotonic()
        self.classifier.eval()
        self.confusion = self.device.put(torch.zeros(outputs, outputs))
        self.loss = self.device.put(torch.zeros(1))
        count = min(limit, len(split)) or len(split)
        chosen = np.arange(count) * len(split) // count
        steps = -(-count // self.batch_size)
        shown = progress and self.device.processes.is_main
        for batch in track(prefetch(self._batches(split, chosen)), steps, "evaluating", shown):
            self._step(*(self.device.put(tensor, batch_dim=0, local=True) for tensor in batch))
        confusion, loss = (self.device.mean(x).cpu() * parts_of_batch() for x in (self.confusion, self.loss))
        self.classifier.train()
        return Evaluation(confusion.round().long(), float(loss) / count, time.monotonic() - start)

    def _batches(self, split: TokenSplit, chosen: np.ndarray) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Tokens, labels and which examples count, of this process's rows of each batch."""
        longest, rows = self.classifier.config.max_length, self.device.local_rows(self.batch_size).numpy()
        for indices, length, valid in evaluation_batches(
            split.lengths[chosen], self.batch_size, longest, self.bucket_lengths
        ):
            indices = chosen[indices[rows]]
            yield split.rows(indices, length), split.labels[indices], torch.from_numpy(valid[rows]).float()

    @torch.no_grad()
    def _count(self, tokens: Tensor, labels: Tensor, valid: Tensor) -> None:
        """Adds a batch to the sums. labels int64 (B,); valid float (B,), 0 where an example is not to be counted."""
        with self.device.autocast(self.precision):
            logits = self._compute(tokens)
        log_p = F.log_softmax(logits.float(), dim=-1)  # (B, C)
        true = F.one_hot(labels, log_p.shape[-1]).float()
        found = F.one_hot(log_p.argmax(-1), log_p.shape[-1]).float()
        self.confusion = self.confusion + (true * valid[:, None]).T @ found
        self.loss = self.loss - ((true * log_p).sum(-1) * valid).sum()  # (1,)
