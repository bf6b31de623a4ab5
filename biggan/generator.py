"""The BigGAN generator: noise and class to image, with attention by any mechanism at any set of resolutions.

Parameter names (shapes and names never depend on the mechanism):

    shared.weight                                   class embedding, where shared_dim > 0
    linear.{weight,bias}                            z, or its first chunk, to the 4x4 map
    blocks.{i}.residual.{conv1,conv2,shortcut}.*    i = 0 makes 8x8
    blocks.{i}.residual.{bn1,bn2}.{gain,bias}.*     maps from the condition
    blocks.{i}.attention.{theta,phi,g,o}.weight     where block i has attention; and .gamma
    output.{bn,conv}.*

Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", arXiv:1809.11096.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from biggan.architectures import generator_blocks
from biggan.batch_norm import BatchNorm
from biggan.blocks import GeneratorBlock, Stage
from biggan.layers import initialize_orthogonal
from biggan.spectral_norm import SpectralConv2d, SpectralLinear


class Generator(nn.Module):
    """z (B, dim_z), y (B,) -> images (B, 3, resolution, resolution) in [-1, 1].

    Args:
        resolution: pixels of a side, one of `architectures.GENERATOR_WIDTHS`.
        channels: base width; the widths of the blocks are multiples of it.
        dim_z: length of z. With `hierarchical` it is rounded down to a multiple of the number of chunks; the attribute
            `dim_z` holds the length that is used.
        num_classes: y is in [0, num_classes).
        shared_dim: length of a class embedding that all blocks share; 0 gives every batch norm its own embedding.
        hierarchical: split z into one chunk for the 4x4 map and one for the condition of each block.
        attention_resolutions: resolutions of the maps that attention follows.
        attention, attention_options: mechanism and options for every `attention.SpatialAttention`.

    Raises:
        ValueError: unknown resolution, attention resolution or mechanism; cluster sizes that do not fit a map;
            `hierarchical` without `shared_dim`, or with fewer than one z component a chunk.
        TypeError: an option that the mechanism does not have.
    """

    def __init__(
        self,
        *,
        resolution: int = 128,
        channels: int = 64,
        dim_z: int = 120,
        num_classes: int = 1,
        shared_dim: int = 0,
        hierarchical: bool = False,
        attention_resolutions: Sequence[int] = (64,),
        attention: str = "smyrf",
        attention_options: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        specs = generator_blocks(resolution, channels, attention_resolutions)
        num_chunks = len(specs) + 1 if hierarchical else 1
        if hierarchical and shared_dim == 0:
            raise ValueError("hierarchical z is joined to the shared class embedding: it needs shared_dim > 0")
        if dim_z < num_chunks:
            raise ValueError(f"dim_z {dim_z} is too short: it must have at least {num_chunks} components")
        self.resolution = resolution
        self.num_classes = num_classes
        self.hierarchical = hierarchical
        self.chunk_dim = dim_z // num_chunks
        self.dim_z = self.chunk_dim * num_chunks

        if shared_dim:
            self.shared = nn.Embedding(num_classes, shared_dim)
            condition_dim = shared_dim + (self.chunk_dim if hierarchical else 0)
            projection = partial(SpectralLinear, condition_dim, bias=False)
        else:
            self.shared = nn.Identity()
            projection = partial(nn.Embedding, num_classes)
        self.linear = SpectralLinear(self.chunk_dim, specs[0].in_channels * 4 * 4)
        self.blocks = nn.ModuleList(
            Stage(GeneratorBlock(spec.in_channels, spec.out_channels, projection), spec, attention, attention_options)
            for spec in specs
        )
        out_channels = specs[-1].out_channels
        self.output = nn.Sequential(
            OrderedDict(bn=BatchNorm(out_channels), relu=nn.ReLU(inplace=True), conv=SpectralConv2d(out_channels, 3, 3))
        )
        initialize_orthogonal(self)

    def embed(self, y: Tensor) -> Tensor:
        """y (B,) -> what conditions the blocks: (B, shared_dim), or y itself where no embedding is shared."""
        return self.shared(y)

    def synthesize(self, z: Tensor, condition: Tensor) -> Tensor:
        """Images from z (B, dim_z) and the output of `embed` (or a mixture of such outputs, where it is a vector)."""
        if z.shape[1] != self.dim_z:
            raise ValueError(f"z has {z.shape[1]} components, the generator takes {self.dim_z}")
        if self.hierarchical:
            z, *chunks = z.split(self.chunk_dim, dim=1)
            conditions = [torch.cat([condition, chunk], dim=1) for chunk in chunks]
        else:
            conditions = [condition] * len(self.blocks)
        h = self.linear(z).unflatten(1, (-1, 4, 4))  # (B, C, 4, 4)
        for stage, stage_condition in zip(self.blocks, conditions, strict=True):
            h = stage(h, stage_condition)  # (B, C', 2H, 2W)
        # In the dtype of the parameters under autocast too: the 8 bits of bfloat16 are too few for a pixel.
        return self.output(h).to(self.linear.weight.dtype).tanh()

    def forward(self, z: Tensor, y: Tensor) -> Tensor:
        return self.synthesize(z, self.embed(y))
