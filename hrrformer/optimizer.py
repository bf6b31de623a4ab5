"""Adam and AdamW with the schedules of the learning rate, which is a function of the step alone."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from hrrformer.config import OptimizerConfig
from runtime.device import Device


def build_optimizer(network: nn.Module, config: OptimizerConfig, device: Device) -> torch.optim.Adam:
    """Adam over all parameters of a network that is on the device already; call `set_learning_rate` before each step.

    adamw's decay is decoupled (Loshchilov and Hutter 2019, arXiv:1711.05101), adam's is part of the gradient.
    """
    return device.adam(
        network.parameters(),
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        weight_decay=config.weight_decay,
        decoupled_weight_decay=config.name == "adamw",
    )


def set_learning_rate(optimizer: torch.optim.Adam, rate: Tensor) -> None:
    """Uses `rate` from now on: a tensor (1,) on the optimizer's device, so that a new rate is not a new program."""
    for group in optimizer.param_groups:
        group["lr"] = rate.squeeze()


def learning_rate(config: OptimizerConfig, step: int, total_steps: int, batch_size: int) -> float:
    """The rate of step `step`, counted from 0.

    The first warmup_steps grow linearly to lr. In the i-th step after them the rate is
    exponential: max(lr decay_rate^(max(i - 1, 0) / s), min_lr), s = decay_examples // batch_size, at least 1;
    cosine: min_lr + (lr - min_lr) (1 + cos(π i / n)) / 2, n the steps after warm-up (Loshchilov and Hutter 2017,
    arXiv:1608.03983, Eq. 5).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / (config.warmup_steps + 1)
    i = step - config.warmup_steps
    if config.schedule == "cosine":
        progress = min(1.0, i / max(1, total_steps - config.warmup_steps))
        return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * progress)) / 2
    decay_steps = max(1, config.decay_examples // batch_size)
    return max(config.lr * config.decay_rate ** (max(i - 1, 0) / decay_steps), config.min_lr)
