"""The residual blocks, and the stage that is a block and perhaps an attention after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention import SpatialAttention
from biggan.architectures import BlockSpec
from biggan.batch_norm import ConditionalBatchNorm
from biggan.layers import conv_after_upsample, conv_before_downsample, downsample2x, upsample2x
from biggan.recomputation import Recompute, recomputed
from biggan.spectral_norm import SpectralConv2d


class GeneratorBlock(nn.Module):
    """BN-ReLU-up-conv3-BN-ReLU-conv3 plus a shortcut: (B, C, H, W) -> (B, C', 2H, 2W).

    `projection(channels)` makes the maps from the condition to gains and biases (see `ConditionalBatchNorm`).
    """

    def __init__(self, in_channels: int, out_channels: int, projection: Callable[[int], nn.Module]):
        super().__init__()
        self.bn1 = ConditionalBatchNorm(in_channels, projection)
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3, convolve=conv_after_upsample)
        self.bn2 = ConditionalBatchNorm(out_channels, projection)
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3)
        self.shortcut = SpectralConv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        h = F.relu(self.bn1(x, condition), inplace=True)  # (B, C, H, W)
        h = self.conv1(h)  # (B, C', 2H, 2W)
        h = F.relu(self.bn2(h, condition), inplace=True)
        h = self.conv2(h)
        # A 1x1 convolution and nearest upsampling commute: in this order it has a quarter of the pixels to do.
        return h + upsample2x(self.shortcut(x))


class DiscriminatorBlock(nn.Module):
    """(ReLU)-conv3-ReLU-conv3-(pool) plus a shortcut: (B, C, H, W) -> (B, C', H/2, W/2), or (B, C', H, W).

    The first block of a network sees the image, which takes no ReLU: `preactivation=False`.
    """

    def __init__(self, in_channels: int, out_channels: int, *, preactivation: bool, downsample: bool):
        super().__init__()
        self.preactivation = preactivation
        self.downsample = downsample
        self.conv1 = SpectralConv2d(in_channels, out_channels, 3)
        convolve = conv_before_downsample if downsample else None
        self.conv2 = SpectralConv2d(out_channels, out_channels, 3, convolve=convolve)
        learned_shortcut = downsample or in_channels != out_channels
        self.shortcut = SpectralConv2d(in_channels, out_channels, 1) if learned_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(x) if self.preactivation else x  # not in place: the shortcut takes x itself
        h = self.conv2(F.relu(self.conv1(h), inplace=True))  # (B, C', H/2, W/2)
        # A 1x1 convolution and the mean of 2x2 squares commute: pooled first, it has a quarter of the pixels to do.
        return h + self.shortcut(downsample2x(x) if self.downsample else x)


class Stage(nn.Module):
    """A residual block, then an attention block where the architecture asks for one.

    Attributes:
        recompute: how the parts named in `recomputed_parts` run, when there is a backward pass to come.
        recomputed_parts: of "residual" and "attention", those that keep only their inputs for it.

    Raises:
        ValueError: the mechanism cannot take this resolution (cluster sizes that do not fit, for example).
    """

    def __init__(
        self, residual: nn.Module, spec: BlockSpec, attention: str, attention_options: Mapping[str, Any] | None
    ):
        super().__init__()
        self.residual = residual
        self.resolution = spec.resolution
        self.recompute: Recompute | None = None
        self.recomputed_parts: tuple[str, ...] = ()
        self.attention = None
        if spec.attention:
            conv = partial(SpectralConv2d, kernel_size=1, bias=False)
            self.attention = SpatialAttention(spec.out_channels, attention, conv=conv, **(attention_options or {}))
            self.attention.check_resolution(spec.resolution)

    def forward(self, x: Tensor, *condition: Tensor) -> Tensor:
        x = self._run("residual", x, *condition)
        return x if self.attention is None else self._run("attention", x)

    def _run(self, part: str, *args: Tensor) -> Tensor:
        module = getattr(self, part)
        if part in self.recomputed_parts and torch.is_grad_enabled():
            return recomputed(module, self.recompute, *args)
        return module(*args)
