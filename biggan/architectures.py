"""Which blocks a generator or a discriminator of a given resolution is made of.

Widths are multiples of the base width `channels`. The generator starts from a 4x4 map and doubles at every block. The
discriminator starts from the image and halves at every block but the last (at 32 pixels, at every block but the last
two).

A block's resolution is that of its *output*: the discriminator's list for 128 pixels starts at 64. Attention stands
after the block, so `attention_resolutions` are read against these numbers.

Source: Brock et al. 2019, "Large Scale GAN Training for High Fidelity Natural Image Synthesis", arXiv:1809.11096,
appendix B.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# Width of the 4x4 map, then of every block's output.
GENERATOR_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (16, 16, 8, 4, 2),
    128: (16, 16, 8, 4, 2, 1),
    256: (16, 16, 8, 8, 4, 2, 1),
    512: (16, 16, 8, 8, 4, 2, 1, 1),
    1024: (16, 16, 8, 8, 4, 4, 2, 1, 1),
}

# Width of every block's output; the input is an RGB image.
DISCRIMINATOR_WIDTHS = {
    32: (4, 4, 4, 4),
    64: (1, 2, 4, 8, 16),
    128: (1, 2, 4, 8, 16, 16),
    256: (1, 2, 4, 8, 8, 16, 16),
    512: (1, 1, 2, 4, 8, 8, 16, 16),
    1024: (1, 1, 2, 4, 4, 8, 8, 16, 16),
}


@dataclass(frozen=True)
class BlockSpec:
    """One residual block: its widths, the resolution of its output, and what stands in and after it."""

    in_channels: int
    out_channels: int
    resolution: int
    resample: bool
    attention: bool


def generator_blocks(resolution: int, channels: int, attention_resolutions: Sequence[int]) -> list[BlockSpec]:
    """The generator's blocks, from 8x8 to the image.

    Raises:
        ValueError: no architecture has this resolution, or no block has one of the attention resolutions.
    """
    widths = _look_up(GENERATOR_WIDTHS, resolution)
    sizes = [8 << i for i in range(len(widths) - 1)]
    _check_attention("generator", resolution, attention_resolutions, sizes)
    return [
        BlockSpec(
            channels * in_width, channels * out_width, size, resample=True, attention=size in attention_resolutions
        )
        for in_width, out_width, size in zip(widths[:-1], widths[1:], sizes, strict=True)
    ]


def discriminator_blocks(resolution: int, channels: int, attention_resolutions: Sequence[int]) -> list[BlockSpec]:
    """The discriminator's blocks, from the image to the last map.

    Raises:
        ValueError: as `generator_blocks`.
    """
    widths = _look_up(DISCRIMINATOR_WIDTHS, resolution)
    num_halvings = 2 if resolution == 32 else len(widths) - 1
    sizes = [resolution >> min(i + 1, num_halvings) for i in range(len(widths))]
    _check_attention("discriminator", resolution, attention_resolutions, sizes)
    in_channels = [3] + [channels * width for width in widths[:-1]]
    return [
        BlockSpec(
            in_channels[i], channels * width, size, resample=i < num_halvings, attention=size in attention_resolutions
        )
        for i, (width, size) in enumerate(zip(widths, sizes, strict=True))
    ]


def _look_up(table: dict[int, tuple[int, ...]], resolution: int) -> tuple[int, ...]:
    if resolution not in table:
        raise ValueError(f"no architecture for {resolution} pixels; there are {', '.join(map(str, table))}")
    return table[resolution]


def _check_attention(network: str, resolution: int, wanted: Sequence[int], sizes: list[int]) -> None:
    unknown = [size for size in wanted if size not in sizes]
    if unknown:
        valid = ", ".join(map(str, sorted(set(sizes))))
        raise ValueError(
            f"attention at {', '.join(map(str, unknown))}: the {network} of {resolution} pixels has maps of {valid}"
        )
