"""Activation checkpointing of modules that keep statistics: memory for time, and the same numbers.

Chen et al. 2016, "Training deep nets with sublinear memory cost", arXiv:1604.06174: keep a module's inputs, and run it
again in the backward pass. Spectral norm and batch norm move their buffers in a forward pass, so the second run must
neither see what the first one stored nor store anything.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call

Recompute = Callable[..., Tensor]  # (function, *args) -> function(*args), as `runtime.device.Device.recompute`


@torch.compiler.disable
def recomputed(module: nn.Module, recompute: Recompute, *args: Tensor) -> Tensor:
    """module(*args), computed again in the backward pass from the buffers that it started with."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    runs = 0

    def function(*args: Tensor) -> Tensor:
        nonlocal runs
        runs += 1
        return module(*args) if runs == 1 else functional_call(module, before, args)

    return recompute(function, *args)
