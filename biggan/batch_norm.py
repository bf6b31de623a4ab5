"""Batch normalisation with a gain and a bias that are either learned or computed from the class.

Every batch norm of the generator goes through the function `batch_norm`. Its statistics are those of the whole batch,
however many devices or processes hold a part of it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.distributed import mean_over_parts, parts_of_batch

FUSED_DEVICES = ("cpu", "cuda")  # where torch's own operation is the better one


def batch_norm(
    x: Tensor,
    gain: Tensor,
    bias: Tensor,
    stored_mean: Tensor,
    stored_var: Tensor,
    *,
    training: bool,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """gain * (x - mean) / sqrt(var + eps) + bias, per channel.

    Args:
        x: (B, C, H, W).
        gain, bias: (B, C), or (C,) for all of the batch.
        stored_mean, stored_var: (C,), the running statistics.
        training: True takes the statistics from the batch and moves the stored ones towards them by `momentum`
            (the variance as the unbiased one); False uses the stored ones.

    Returns:
        (B, C, H, W) in the dtype of x.

    Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1.
    """
    fused = x.device.type in FUSED_DEVICES and not (training and parts_of_batch() > 1)
    normalize = F.batch_norm if fused else primitive_batch_norm
    x = normalize(x, stored_mean, stored_var, training=training, momentum=momentum, eps=eps)
    gain, bias = gain[..., None, None].to(x.dtype), bias[..., None, None].to(x.dtype)
    return torch.addcmul(bias, x, gain)  # one pass over x


def primitive_batch_norm(
    x: Tensor, stored_mean: Tensor, stored_var: Tensor, *, training: bool, momentum: float, eps: float
) -> Tensor:
    """`F.batch_norm` from sums and products: (x - mean) / sqrt(var + eps).

    A compiler that partitions a program over devices turns the means into means over all of them. Around the fused
    operation, torch-xla gathers the whole batch on every device, and it stores the biased variance. Processes that hold
    parts of a batch, all of one size, average their means.
    """
    if not training:
        scale = (stored_var + eps).rsqrt()
        return x * scale[:, None, None].to(x.dtype) - (stored_mean * scale)[:, None, None].to(x.dtype)
    mean = mean_over_parts(x.mean((0, 2, 3), dtype=stored_mean.dtype))
    centered = x - mean[:, None, None]  # in float32 where x is bfloat16
    var = mean_over_parts(centered.square().mean((0, 2, 3)))
    with torch.no_grad():
        count = parts_of_batch() * x.numel() // x.shape[1]
        stored_mean.lerp_(mean, momentum)
        stored_var.lerp_(var * (count / (count - 1)), momentum)
    return (centered * (var + eps).rsqrt()[:, None, None]).to(x.dtype)


class BatchNorm(nn.Module):
    """Batch norm with a learned gain and bias per channel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        _add_statistics(self, channels)

    def forward(self, x: Tensor) -> Tensor:
        return batch_norm(
            x, self.gain, self.bias, self.stored_mean, self.stored_var, training=self.training, momentum=self.momentum
        )


class ConditionalBatchNorm(nn.Module):
    """Batch norm with gain `1 + gain(condition)` and bias `bias(condition)`.

    `projection(channels)` makes the two maps from a condition to (B, channels): a linear layer where the condition is
    a vector (B, E), an embedding where it is a class number (B,).

    Source: de Vries et al. 2017, arXiv:1707.00683; Brock et al. 2019, arXiv:1809.11096, appendix B.
    """

    def __init__(self, channels: int, projection: Callable[[int], nn.Module]):
        super().__init__()
        self.gain = projection(channels)
        self.bias = projection(channels)
        _add_statistics(self, channels)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        gain, bias = 1 + self.gain(condition), self.bias(condition)
        return batch_norm(
            x, gain, bias, self.stored_mean, self.stored_var, training=self.training, momentum=self.momentum
        )


def _add_statistics(module: nn.Module, channels: int) -> None:
    module.momentum = 0.1
    module.register_buffer("stored_mean", torch.zeros(channels))
    module.register_buffer("stored_var", torch.ones(channels))
