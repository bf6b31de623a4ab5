"""One training step of any objective: forward, loss, backward, clipping, optimizer; and the objective of the tasks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from attention import get_mechanism
from hrrformer.config import TrainConfig
from hrrformer.losses import smoothed_cross_entropy, two_sided_cross_entropy
from hrrformer.model import SequenceClassifier
from hrrformer.optimizer import build_optimizer, set_learning_rate
from runtime.device import Device
from runtime.errors import UserError
from runtime.guard import Guard, gradient_norms
from runtime.state import load_optimizer_by_name, load_weights, optimizer_state_by_name


def build_classifier(config: TrainConfig) -> SequenceClassifier:
    """Raises UserError where the configuration asks for what no network or mechanism has."""
    try:
        mechanism = get_mechanism(config.attention.name)
        if config.model.use_mask and mechanism.masks is not True:
            raise mechanism.refusal("masks", "cannot leave padding out, as --model.use-mask asks")
        return SequenceClassifier(config.model, config.attention.name, config.attention.options)
    except (ValueError, TypeError) as error:
        raise UserError(f"network: {error}") from None


class Classification(nn.Module):
    """The tasks' objective: the loss that the configuration names, around a classifier."""

    def __init__(self, classifier: SequenceClassifier, config: TrainConfig) -> None:
        super().__init__()
        self.classifier = classifier
        self.two_sided, self.smoothing = config.loss == "two-sided", config.label_smoothing

    def forward(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """tokens as the classifier takes, labels int64 (B,) -> mean loss and accuracy, scalars."""
        logits = self.classifier(tokens).float()  # (B, C)
        if self.two_sided:
            loss = two_sided_cross_entropy(logits, labels)
        else:
            loss = smoothed_cross_entropy(logits, labels, self.smoothing)
        return loss, (logits.argmax(-1) == labels).float().mean()


class Learner:
    """An objective with its optimizer, on `device`.

    Args:
        objective: a module on the device that returns a loss and an accuracy, each a mean over its part of a batch.

    Raises:
        UserError: the configuration has values that the optimizer refuses.
    """

    STEP_VALUES = ("loss", "accuracy", "grad_norm")

    def __init__(self, objective: nn.Module, config: TrainConfig, device: Device) -> None:
        self.objective, self.config, self.device = objective.train(), config, device
        try:
            self.optimizer = build_optimizer(objective, config.optimizer, device)
        except ValueError as error:
            raise UserError(f"--optimizer: {error}.") from None
        self._compute = device.compile_network(objective) if config.compile else objective
        gradients = [f"gradient of {name}" for name, _ in objective.named_parameters()]
        self.guard = Guard({"network": ["loss", *gradients]}, device.put)

    def step(self, rate: Tensor, *batch: Tensor) -> dict[str, Tensor]:
        """One update of the weights. A function of its tensors alone: nothing in it reads a number from the device.

        Args:
            rate: (1,), the learning rate.
            batch: the objective's arguments, each (A, ...) for A accumulation steps; of this process's rows.

        Returns:
            Detached scalars by the names in STEP_VALUES, over the whole batch. The gradient's norm is the one before
            clipping.

        From an update on whose loss or gradients are not finite, weights and optimizer stay as they are, until `guard`
        is reset.
        """
        self.objective.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts, sums = len(batch[0]), []
        for part in zip(*batch, strict=True):
            with self.device.autocast(self.config.precision):
                loss, accuracy = self._compute(*part)
            (loss / parts).backward()
            sums.append(torch.stack([loss.detach(), accuracy.detach()]))
        self.device.average_gradients(self.objective.parameters())
        norms = gradient_norms(self.objective)
        norm = torch.linalg.vector_norm(norms)
        if self.config.optimizer.clip_grad_norm:
            nn.utils.clip_grads_with_norm_(self.objective.parameters(), self.config.optimizer.clip_grad_norm, norm)
        set_learning_rate(self.optimizer, rate)
        loss, accuracy = self.device.mean(torch.stack(sums).mean(0)).unbind()
        self.device.update(self.optimizer, self.guard.check("network", torch.cat([loss[None], norms])))
        self.guard.end_step()
        return {"loss": loss, "accuracy": accuracy, "grad_norm": norm}

    def state_dict(self) -> dict[str, Any]:
        """Weights and the optimizer's state, both by parameter names."""
        return {
            "weights": self.objective.state_dict(),
            "optimizer": optimizer_state_by_name(self.objective, self.optimizer),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where `state` is of another architecture."""
        load_weights(self.objective, state["weights"], "network")
        load_optimizer_by_name(self.objective, self.optimizer, state["optimizer"])
        self.guard.reset()


def compile_by_shape(device: Device, step: Callable[..., Any]) -> Callable[..., Any]:
    """`device.compile_step(step)` for each shape of the first argument: batches come in a few lengths."""
    programs = {}

    def run(first: Tensor, *rest: Tensor) -> Any:
        if first.shape not in programs:
            programs[first.shape] = device.compile_step(lambda *tensors: step(*tensors))
        return programs[first.shape](first, *rest)

    return run
