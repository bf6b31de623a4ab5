"""Images from a generator: latents that depend on the seed and the image's number alone, grids and interpolations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from biggan.generator import Generator
from biggan.hash_projections import draw_projections, use_projections
from runtime.device import Device
from runtime.randomness import derive_seed, host_generator


def latents(first: int, count: int, dim_z: int, seed: int, truncation: float | None = None) -> torch.Tensor:
    """z (count, dim_z) of the images `first`, `first + 1`, …: image i has the same z in every call with this seed.

    Args:
        truncation: components come from a normal distribution cut off at +-truncation (Brock et al. 2019,
            arXiv:1809.11096, section 3.1); None is the whole normal distribution.
    """
    rows = [
        np.random.Generator(np.random.Philox(key=derive_seed("z", seed, i))).random(dim_z)
        for i in range(first, first + count)
    ]
    uniform = torch.from_numpy(np.stack(rows))  # float64: the tails need its resolution
    bound = 1.0 if truncation is None else math.erf(truncation / math.sqrt(2))
    quantile = ((2 * uniform - 1) * bound).clamp(-1 + 1e-15, 1 - 1e-15)
    return (torch.erfinv(quantile) * math.sqrt(2)).float()


def class_labels(
    first: int, count: int, num_classes: int, seed: int, classes: Sequence[int] | None = None
) -> torch.Tensor:
    """y (count,) of the images `first`, …: the given classes in turn, or random ones."""
    if classes:
        return torch.tensor([classes[i % len(classes)] for i in range(first, first + count)])
    return torch.tensor([derive_seed("y", seed, i) % num_classes for i in range(first, first + count)])


@torch.no_grad()
def generate(
    generator: Generator,
    z: torch.Tensor,
    y: torch.Tensor,
    device: Device,
    seed: int,
    batch_size: int,
    precision: str = "float32",
) -> Iterator[torch.Tensor]:
    """Batches of uint8 images (B, 3, R, R) on the host, for z (N, dim_z) and y (N,), or y (N, shared_dim) as embedded.

    Every batch is computed at one size, the last one padded, and with the same hash directions,
    so that an image does not depend on what else is drawn beside it. Devices and processes share a batch; all processes
    get the whole, and must take all batches.
    """
    batch_size += -batch_size % device.num_shards

    def render(part_z: torch.Tensor, part_y: torch.Tensor) -> torch.Tensor:
        with device.autocast(precision):
            condition = part_y if part_y.is_floating_point() else generator.embed(part_y)
            return device.all_rows(to_uint8(generator.synthesize(part_z, condition)))

    render = device.compile_step(render)
    projections = draw_projections(generator, (), host_generator("attention", seed))
    use_projections(generator, [device.put(p) for p in projections])
    for start in range(0, len(z), batch_size):
        part_z, part_y = z[start : start + batch_size], y[start : start + batch_size]
        count = len(part_z)
        if count < batch_size:
            part_z = torch.cat([part_z, part_z[-1:].expand(batch_size - count, -1)])
            part_y = torch.cat([part_y, part_y[-1:].expand(batch_size - count, *part_y.shape[1:])])
        yield render(device.put(part_z, batch_dim=0), device.put(part_y, batch_dim=0)).cpu()[:count]
    use_projections(generator, [])


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> uint8, rounded to the nearest."""
    return (images.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


def interpolation_endpoints(
    rows: int, columns: int, what: str, generator: Generator, seed: int, truncation: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """z and y of a sheet whose rows go from one image to another.

    Args:
        what: 'z' moves the latent at a fixed class, 'y' the class embedding at a fixed latent, 'zy' both.

    Returns:
        z (rows * columns, dim_z); y (rows * columns,) for 'z', else embedded (rows * columns, shared_dim).

    Raises:
        ValueError: 'y' or 'zy' for a network whose classes share no embedding.
    """
    weight = torch.linspace(0, 1, columns)[None, :, None]
    z = latents(0, 2 * rows, generator.dim_z, seed, truncation).view(rows, 2, 1, -1)
    y = class_labels(0, 2 * rows, generator.num_classes, seed).view(rows, 2)
    # (rows, columns, dim_z)
    path = z[:, 0].lerp(z[:, 1], weight) if "z" in what else z[:, 0].expand(-1, columns, -1)
    if "y" not in what:
        return path.flatten(0, 1), y[:, :1].expand(-1, columns).flatten()
    with torch.no_grad():
        embedded = generator.embed(y.to(next(generator.parameters()).device)).cpu()
    if not embedded.is_floating_point():
        raise ValueError(
            "this network's classes share no embedding, so there is nothing between two classes; "
            "only z can be interpolated"
        )
    return path.flatten(0, 1), embedded[:, :1].lerp(embedded[:, 1:], weight).flatten(0, 1)
