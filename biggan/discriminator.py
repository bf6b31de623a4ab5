"""The BigGAN discriminator: image and class to a logit, with attention by any mechanism at any set of resolutions.

Parameter names (shapes and names never depend on the mechanism):

    blocks.{i}.residual.{conv1,conv2,shortcut}.*    i = 0 sees the image; a shortcut only where shapes change
    blocks.{i}.attention.{theta,phi,g,o}.weight     where block i has attention; and .gamma
    linear.{weight,bias}                            the unconditional part of the logit
    embed.weight                                    the conditional part

Sources: Brock et al. 2019, arXiv:1809.11096; Miyato and Koyama 2018, "cGANs with Projection Discriminator",
arXiv:1802.05637.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from biggan.architectures import discriminator_blocks
from biggan.blocks import DiscriminatorBlock, Stage
from biggan.layers import initialize_orthogonal
from biggan.spectral_norm import SpectralEmbedding, SpectralLinear


class Discriminator(nn.Module):
    """Images (B, 3, resolution, resolution), y (B,) -> logits (B, 1), float32.

    Args:
        attention_resolutions: resolutions of the maps that attention follows. The first map has half the resolution
            of the image.
        The others as in `Generator`.

    Raises:
        ValueError: unknown resolution, attention resolution or mechanism; cluster sizes that do not fit a map.
        TypeError: an option that the mechanism does not have.
    """

    def __init__(
        self,
        *,
        resolution: int = 128,
        channels: int = 64,
        num_classes: int = 1,
        attention_resolutions: Sequence[int] = (64,),
        attention: str = "smyrf",
        attention_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        specs = discriminator_blocks(resolution, channels, attention_resolutions)
        self.resolution = resolution
        self.num_classes = num_classes
        self.blocks = nn.ModuleList()
        for i, spec in enumerate(specs):
            residual = DiscriminatorBlock(
                spec.in_channels, spec.out_channels, preactivation=i > 0, downsample=spec.resample
            )
            self.blocks.append(Stage(residual, spec, attention, attention_options))
        out_channels = specs[-1].out_channels
        self.linear = SpectralLinear(out_channels, 1)
        self.embed = SpectralEmbedding(num_classes, out_channels)
        initialize_orthogonal(self)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        for stage in self.blocks:
            x = stage(x)  # (B, C', H/2, W/2)
        # The head is tiny and its sums are long: in the dtype of the parameters under autocast too.
        with torch.autocast(x.device.type, enabled=False):
            features = F.relu(x.to(self.linear.weight.dtype)).sum(dim=(2, 3))  # (B, C)
            projection = (self.embed(y) * features).sum(dim=1, keepdim=True)
            return self.linear(features) + projection
