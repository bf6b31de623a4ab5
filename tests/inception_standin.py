"""Deterministic stand-in weights for the FID-Inception network, each tensor a function of its key alone."""

from __future__ import annotations

import zlib
from functools import cache

import numpy as np
import torch
from torch import Tensor

from biggan.metrics.inception import ConvReLU, FIDInception


@cache
def standin_state() -> dict[str, Tensor]:
    """The 566 tensors of a weights file, under its names. Shared between callers: copy before changing."""
    state = {}
    with torch.device("meta"):
        network = FIDInception()
    for name, layer in network.named_modules():
        if isinstance(layer, ConvReLU):
            channels = (layer.conv.out_channels,)
            state[f"{name}.conv.weight"] = _fill(f"{name}.conv.weight", tuple(layer.conv.weight.shape))
            for part in ("weight", "bias", "running_mean", "running_var"):
                state[f"{name}.bn.{part}"] = _fill(f"{name}.bn.{part}", channels)
            state[f"{name}.bn.num_batches_tracked"] = torch.tensor(0)
    state["fc.weight"] = _fill("fc.weight", (1008, 2048))
    state["fc.bias"] = _fill("fc.bias", (1008,))
    return state


def _fill(key: str, shape: tuple[int, ...]) -> Tensor:
    values = np.random.RandomState(zlib.crc32(key.encode())).standard_normal(shape)
    if key.endswith("conv.weight"):
        values *= np.sqrt(2 / np.prod(shape[1:]))
    elif key.endswith("bn.weight"):
        values = 1 + 0.1 * values
    elif key.endswith("running_var"):
        values = np.exp(0.2 * values)
    elif key == "fc.weight":
        values /= np.sqrt(shape[1])
    else:  # bn.bias, bn.running_mean, fc.bias
        values *= 0.1
    return torch.from_numpy(values.astype(np.float32))
