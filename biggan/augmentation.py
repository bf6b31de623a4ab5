"""Differentiable augmentation of what the discriminator sees, real and generated, in both networks' steps.

Images are (B, 3, R, R) in [-1, 1]. Every transform is made of uniform numbers in [0, 1) that are drawn on the host, a
row an image, has static shapes and carries gradients to the images, also those of gradients.

    name          transforms                                                        source
    color         brightness, saturation, contrast                                  DiffAugment
    translation   by whole pixels, up to an eighth of the side, onto zeros          DiffAugment
    cutout        a square of half the side becomes zeros                           DiffAugment
    flip          mirrored, every second image                                      ADA
    rotation      by 0, 90, 180 or 270 degrees                                      ADA
    scale         by a factor with log-normal distribution, about the centre        ADA

Sources: DiffAugment is Zhao et al. 2020, arXiv:2006.10738; ADA is Karras et al. 2020, arXiv:2006.06676, appendix B.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def brightness(x: Tensor, u: Tensor) -> Tensor:
    """All pixels of an image plus a number from [-1/2, 1/2). u (B, 1)."""
    return x + (u - 0.5).view(-1, 1, 1, 1)


def saturation(x: Tensor, u: Tensor) -> Tensor:
    """The distance of a pixel from its grey times a factor from [0, 2). u (B, 1)."""
    grey = x.mean(dim=1, keepdim=True)
    return grey + (x - grey) * (2 * u).view(-1, 1, 1, 1)


def contrast(x: Tensor, u: Tensor) -> Tensor:
    """The distance of an image from its mean times a factor from [1/2, 3/2). u (B, 1)."""
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    return mean + (x - mean) * (u + 0.5).view(-1, 1, 1, 1)


def translation(x: Tensor, u: Tensor) -> Tensor:
    """By whole pixels, up to round(R / 8) each way; zeros come in. u (B, 2): down, right."""
    limit = int(x.shape[-1] / 8 + 0.5)
    return shift(x, _integers(u, 2 * limit + 1) - limit)


def shift(x: Tensor, pixels: Tensor) -> Tensor:
    """Each image by its own int64 pixels (B, 2), down and right; zeros come in."""
    size = x.shape[-1]
    source = torch.arange(size, device=x.device) - pixels.unsqueeze(-1)  # (B, 2, R): rows and columns
    inside = (source >= 0) & (source < size)
    rows, columns = source.clamp(0, size - 1).unbind(1)
    index = (rows.unsqueeze(2) * size + columns.unsqueeze(1)).flatten(1)  # (B, R * R)
    shifted = torch.take_along_dim(x.flatten(2), index.unsqueeze(1), dim=2).view(x.shape)
    return shifted * (inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)).unsqueeze(1)


def cutout(x: Tensor, u: Tensor) -> Tensor:
    """A square of side R / 2 becomes zeros; it may lie partly outside. u (B, 2): its place."""
    size = x.shape[-1]
    first = _integers(u, size + 1) - size // 4  # of R // 2 rows and columns
    offset = torch.arange(size, device=x.device) - first.unsqueeze(-1)  # (B, 2, R)
    inside = (offset >= 0) & (offset < size // 2)
    return x * ~(inside[:, 0].unsqueeze(2) & inside[:, 1].unsqueeze(1)).unsqueeze(1)


def flip(x: Tensor, u: Tensor) -> Tensor:
    """Mirrored left to right, or not. u (B, 1)."""
    return torch.where((u < 0.5).view(-1, 1, 1, 1), x.flip(3), x)


def rotation(x: Tensor, u: Tensor) -> Tensor:
    """By 0, 90, 180 or 270 degrees. u (B, 1)."""
    quarters = _integers(u, 4).view(-1, 1, 1, 1)
    half = torch.where(quarters >= 2, x.flip(2, 3), x)
    return torch.where(quarters % 2 == 1, half.transpose(2, 3).flip(2), half)


def scale(x: Tensor, u: Tensor) -> Tensor:
    """By 2^(n / 5), n from a normal distribution; borders are mirrored. u (B, 2).

    One matrix product along the rows and one along the columns, with the weights of linear interpolation, which are
    wider where the image gets smaller.
    """
    size = x.shape[-1]
    normal = (-2 * torch.log1p(-u[:, 0])).sqrt() * (2 * math.pi * u[:, 1]).cos()  # Box and Muller 1958
    step = (-math.log(2) / 5 * normal).exp().view(-1, 1, 1)  # pixels of x from one pixel to the next
    pixel = torch.arange(size, device=x.device)
    place = (pixel.view(-1, 1) - (size - 1) / 2) * step + size / 2  # (B, R, 1), from the border of x
    place = size - (size - place.abs()).abs()
    distance = (place - 0.5).clamp(0, size - 1) - pixel  # (B, R, R)
    weights = (1 - distance.abs() / step.clamp_min(1)).relu()
    weights = weights / weights.sum(dim=2, keepdim=True)
    return weights.unsqueeze(1) @ x @ weights.transpose(1, 2).unsqueeze(1)


def _integers(u: Tensor, count: int) -> Tensor:
    """Uniform numbers in [0, 1) -> uniform int64 from 0 to count - 1."""
    return (u * count).floor().long()


Transform = Callable[[Tensor, Tensor], Tensor]

# By the name in a policy: the transforms, and how many uniform numbers each takes for an image.
POLICIES: dict[str, tuple[tuple[Transform, int], ...]] = {
    "color": ((brightness, 1), (saturation, 1), (contrast, 1)),
    "translation": ((translation, 2),),
    "cutout": ((cutout, 2),),
    "flip": ((flip, 1),),
    "rotation": ((rotation, 1),),
    "scale": ((scale, 2),),
}


class Augmentation:
    """Transforms in a given order, each with the same probability for every image.

    Attributes:
        numbers: the uniform numbers that it takes for an image.

    Raises:
        ValueError: a name that is none of POLICIES, or comes twice.
    """

    def __init__(self, policy: Sequence[str]) -> None:
        if unknown := [name for name in policy if name not in POLICIES]:
            raise ValueError(f"unknown augmentation '{unknown[0]}'; there are {', '.join(POLICIES)}")
        if len(set(policy)) < len(policy):
            raise ValueError(f"an augmentation comes twice in {', '.join(policy)}")
        self.transforms = [transform for name in policy for transform in POLICIES[name]]
        self.numbers = sum(count + 1 for _, count in self.transforms)

    def __call__(self, images: Tensor, uniforms: Tensor, probability: Tensor | float) -> Tensor:
        """images (B, 3, R, R), uniforms (B, numbers), probability a number or () -> images; what no transform hits is
        returned bit for bit."""
        rest = uniforms
        for transform, count in self.transforms:
            chance, own, rest = rest.split([1, count, rest.shape[1] - count - 1], dim=1)
            images = torch.where((chance < probability).view(-1, 1, 1, 1), transform(images, own), images)
        return images
