"""The averaged generator: exponential moving average of weights and buffers.

Source: Karras et al. 2018 (arXiv:1710.10196), section 4.1; Brock et al. 2019 (arXiv:1809.11096), section 3.
"""

from __future__ import annotations

import torch
from torch import nn

from biggan.config import EmaConfig


def ema_decay(config: EmaConfig, step: int) -> float:
    """Decay of the update after optimisation step `step` (the first is 1); 0 copies."""
    if step < config.start_step:
        return 0.0
    n = step - config.start_step
    return min(config.decay, (1 + n) / (10 + n)) if config.warmup else config.decay


@torch.no_grad()
def update_ema(averaged: nn.Module, model: nn.Module, rate: torch.Tensor) -> None:
    """averaged <- averaged + rate * (model - averaged) over all weights and buffers; `rate`: () tensor, 1 - decay.

    A tensor, because a device that compiles the step must not see the number (it would compile one step a number).
    """
    for target, source in zip(averaged.state_dict().values(), model.state_dict().values(), strict=True):
        if target.is_floating_point():
            target.lerp_(source, rate.to(target.dtype))
        else:
            target.copy_(source)
