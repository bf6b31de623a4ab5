"""Sliced Wasserstein distance between patches of two sets of images, at every scale. Needs no pretrained network.

Source: Karras et al. 2018, "Progressive Growing of GANs", arXiv:1710.10196, section 5. Per level of a Laplacian pyramid
from the full resolution down to 16x16: 128 patches of 7x7 pixels an image, each colour channel normalised over all
patches of its set to mean 0 and standard deviation 1; then the mean absolute difference of the sorted projections on
512 random directions, times 1000. The normalisation hides differences of brightness and contrast that a whole set has.

The sets being finite, two sets of one distribution are some way apart too: 15.3, 12.2, 9.2, 6.4 for 250, 500, 1000,
2000 photographs of faces against as many others (64x64, the mean over levels). Compare only distances of equal numbers
of images, and read them against that floor, `sliced_wasserstein(real, other_real)`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.progress import track

COARSEST_LEVEL = 16
PATCH_SIZE = 7
PATCHES_PER_IMAGE = 128
NUM_DIRECTIONS = 512
CHUNK_IMAGES = 32  # images whose pyramid is in memory at a time
CHUNK_VALUES = 1 << 23  # projections in memory at a time, on each side
BINOMIAL = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0]) / 16


def pyramid_levels(resolution: int) -> list[int]:
    """Sizes of the pyramid's levels: 64 -> [64, 32, 16].

    Raises:
        ValueError: a resolution that is not 16, 32, 64, ...
    """
    levels = [resolution]
    while levels[-1] > COARSEST_LEVEL and levels[-1] % 2 == 0:
        levels.append(levels[-1] // 2)
    if levels[-1] != COARSEST_LEVEL:
        raise ValueError(f"the sliced Wasserstein distance needs a resolution of 16, 32, 64, ..., got {resolution}")
    return levels


def sliced_wasserstein(real: Tensor, fake: Tensor, seed: int = 0, progress: bool = False) -> dict[str, float]:
    """Distances a level and their mean; deterministic given the seed.

    Memory: the patches of one level, 150 kB per pair of images, and at most 64 MB of projections.

    Args:
        real: uint8 (N, 3, R, R).  fake: the same shape.

    Returns:
        {"swd_64": ..., "swd_32": ..., "swd_16": ..., "swd": their mean} for R = 64.

    Raises:
        ValueError: other shapes, types or resolutions, or different numbers of images.
    """
    for images in (real, fake):
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3 or len(images) == 0:
            raise ValueError(f"expected uint8 images (N, 3, R, R), got {images.dtype} {tuple(images.shape)}")
    if real.shape != fake.shape:
        raise ValueError(
            f"both sides must have as many images of one size: sorted projections are compared one by one; "
            f"got {tuple(real.shape)} and {tuple(fake.shape)}"
        )
    generator = torch.Generator().manual_seed(seed)
    distances = {}
    levels = pyramid_levels(real.shape[-1])
    for level in track(levels, len(levels), "sliced Wasserstein distance, levels", progress):
        descriptors_real = patch_descriptors(real, level, generator)
        descriptors_fake = patch_descriptors(fake, level, generator)
        distances[f"swd_{level}"] = 1e3 * _sorted_projection_distance(descriptors_real, descriptors_fake, generator)
    distances["swd"] = sum(distances.values()) / len(distances)
    return distances


def patch_descriptors(images: Tensor, level: int, generator: torch.Generator) -> Tensor:
    """Random patches of one pyramid level of uint8 images (N, 3, R, R), normalised by channel: (N * 128, 147)."""
    patches = torch.empty(len(images), PATCHES_PER_IMAGE, 3, PATCH_SIZE, PATCH_SIZE)
    for start in range(0, len(images), CHUNK_IMAGES):
        band = laplacian_level(images[start : start + CHUNK_IMAGES].float(), level)  # (B, 3, S, S)
        windows = band.unfold(2, PATCH_SIZE, 1).unfold(3, PATCH_SIZE, 1)  # (B, 3, S - 6, S - 6, 7, 7), a view
        positions = torch.randint(level - PATCH_SIZE + 1, (2, len(band), PATCHES_PER_IMAGE), generator=generator)
        image_index = torch.arange(len(band)).unsqueeze(1)
        patches[start : start + CHUNK_IMAGES] = windows[image_index, :, positions[0], positions[1]]  # (B, 128, 3, 7, 7)
    variance, mean = torch.var_mean(patches, dim=(0, 1, 3, 4), correction=0, keepdim=True)
    std = variance.sqrt().clamp(min=1e-8)  # images of one colour have flat bands: 0, not NaN
    return patches.sub_(mean).div_(std).flatten(0, 1).flatten(1)


def laplacian_level(images: Tensor, level: int) -> Tensor:
    """The band of size `level` of the Laplacian pyramid of images (B, 3, R, R); at 16 the low-pass residual.

    Source: Burt & Adelson 1983; the binomial filter, mirrored at the borders.
    """
    while images.shape[-1] > level:
        images = _downsample(images)
    return images if level == COARSEST_LEVEL else images - _upsample(_downsample(images))


def _filter(images: Tensor, gain: float, stride: int) -> Tensor:
    """The separable 5-tap binomial filter, as two passes over single-channel images."""
    batch, channels, height, width = images.shape
    x = F.pad(images.view(batch * channels, 1, height, width), (2, 2, 2, 2), mode="reflect")
    x = F.conv2d(x, gain * BINOMIAL.view(1, 1, 5, 1), stride=(stride, 1))
    x = F.conv2d(x, gain * BINOMIAL.view(1, 1, 1, 5), stride=(1, stride))
    return x.view(batch, channels, height // stride, width // stride)


def _downsample(images: Tensor) -> Tensor:
    return _filter(images, gain=1.0, stride=2)


def _upsample(images: Tensor) -> Tensor:
    """Zeros between the pixels, then the filter with twice its gain along each axis."""
    spread = images.new_zeros(*images.shape[:2], 2 * images.shape[2], 2 * images.shape[3])
    spread[:, :, ::2, ::2] = images
    return _filter(spread, gain=2.0, stride=1)


def _sorted_projection_distance(real: Tensor, fake: Tensor, generator: torch.Generator) -> float:
    """Mean 1-Wasserstein distance of the projections of (M, 147) and (M, 147) on random directions."""
    directions = F.normalize(torch.randn(NUM_DIRECTIONS, real.shape[1], generator=generator), dim=1)
    rows = max(1, CHUNK_VALUES // len(real))
    total = 0.0
    for chunk in directions.split(rows):
        projections = [chunk @ side.T for side in (real, fake)]  # (rows, M) each
        for projection in projections:
            projection.numpy().sort(axis=1)  # in place; numpy's vectorised sort is 15 times faster than torch.sort
        total += projections[0].sub_(projections[1]).abs_().mean(dim=1).sum().item()
    return total / NUM_DIRECTIONS
