"""The phases of a run, masked-token prediction and the task itself: what is learned, from which batches, at what rate.

The batch and the rate of a step are functions of (seed, step) alone.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn

from hrrformer.batching import BatchSchedule
from hrrformer.config import TrainConfig
from hrrformer.data import TaskData
from hrrformer.learner import Classification
from hrrformer.model import SequenceClassifier
from hrrformer.optimizer import learning_rate
from hrrformer.pretraining import MaskedPrediction, hidden_shares, hide_tokens
from runtime.device import Device
from runtime.errors import UserError
from runtime.randomness import derive_seed, host_generator


class Phase(ABC):
    """Steps first .. last - 1 of a run.

    Raises:
        UserError: batches that cannot be made of the training examples.
    """

    name: str

    def __init__(self, config: TrainConfig, data: TaskData, first: int, epochs: float, max_steps: int = 0) -> None:
        self.config, self.split, self.first = config, data.train, first
        seed, longest = derive_seed("batches", self.name, config.seed), config.model.max_length
        try:
            self.schedule = BatchSchedule(data.train.lengths, config.batch_size, longest, seed, config.length_buckets)
        except ValueError as error:
            raise UserError(f"{data.source}: {error}.") from None
        self.steps_per_epoch = self.schedule.steps_per_epoch
        self.num_steps = math.ceil(epochs * self.steps_per_epoch)
        if max_steps:
            self.num_steps = min(self.num_steps, max_steps)
        self.last = first + self.num_steps

    @abstractmethod
    def objective(self, classifier: SequenceClassifier) -> nn.Module:
        """What is learned: a module around `classifier` that takes a part of a batch."""

    @abstractmethod
    def targets(self, indices: np.ndarray, length: int, step: int) -> tuple[Tensor, list[Tensor]]:
        """What the objective takes beside the tokens.

        Args:
            indices: int64 (B,), of the examples, padded to `length`.

        Returns:
            one tensor (B, ...), and those without an example dimension, (A, ...) for A accumulation steps.
        """

    def batches(self, first: int, device: Device) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
        """Of the steps from `first` to the last: the tensors to deal over devices, (A, rows, ...), and the others.

        The first are the tokens and the objective's target, of the rows of B / A that this process must have; the
        others are the learning rate (1,) and what else the objective takes.
        """
        parts = self.config.accumulation_steps
        rows = device.local_rows(self.config.batch_size // parts)
        own = torch.arange(self.config.batch_size).view(parts, -1)[:, rows]  # (A, rows)
        for step in range(first, self.last):
            indices, length = self.schedule.batch(step - self.first)
            tokens = self.split.rows(indices[own.flatten()], length)
            target, others = self.targets(indices, length, step)
            yield [tokens.unflatten(0, own.shape), target[own]], [torch.tensor([self.rate(step)]), *others]

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return learning_rate(self.config.optimizer, step - self.first, self.num_steps, self.config.batch_size)


class Pretraining(Phase):
    name = "pretrain"

    def objective(self, classifier: SequenceClassifier) -> nn.Module:
        return MaskedPrediction(classifier)

    def targets(self, indices: np.ndarray, length: int, step: int) -> tuple[Tensor, list[Tensor]]:
        """Which tokens are hidden, and what each weighs. Drawn for the whole batch by every process: it is little."""
        generator = host_generator("hidden tokens", self.config.seed, step)
        lengths = torch.from_numpy(self.split.lengths[indices])
        hidden = hide_tokens(lengths, length, self.config.pretrain_mask_rate, generator)
        return hidden, [hidden_shares(hidden, self.config.accumulation_steps)]


class Training(Phase):
    name = "train"

    def objective(self, classifier: SequenceClassifier) -> nn.Module:
        return Classification(classifier, self.config)

    def targets(self, indices: np.ndarray, length: int, step: int) -> tuple[Tensor, list[Tensor]]:
        """The labels."""
        return self.split.labels[indices], []


def phases_of(config: TrainConfig, data: TaskData) -> list[Phase]:
    """The pretraining, where there is one, and the training."""
    found: list[Phase] = []
    if config.pretrain_epochs:
        found.append(Pretraining(config, data, 0, config.pretrain_epochs))
    found.append(Training(config, data, found[-1].last if found else 0, config.epochs, config.max_steps))
    return found
