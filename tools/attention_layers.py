"""What the attention layers of a network see: the queries and keys of a call, and the weights that they lead to."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from biggan import sampling
from biggan.checkpoints import load_generator, read
from biggan.config import AttentionConfig
from biggan.data.decode import DamagedImage, open_image, square_rgb
from biggan.gan import build_discriminator
from biggan.hash_projections import draw_projections, use_projections
from runtime.cli import CommandParser
from runtime.device import Device
from runtime.errors import UserError
from runtime.randomness import host_generator
from runtime.state import load_weights

MAP_COLUMNS = 512  # keys whose weights are computed at a time


@dataclass(frozen=True)
class Layer:
    """One call of an attention mechanism.

    `resolution` is the side of the feature map whose positions are the queries, row by row; 0 for a sequence.
    `projections` are the hash directions that SMYRF was given, if it was. `attend(v)` repeats the call with other
    values v (B, H, Nk, Dv), and with the same random choices.
    """

    name: str
    mechanism: nn.Module
    q: Tensor  # (B, H, Nq, D)
    k: Tensor  # (B, H, Nk, D)
    resolution: int
    projections: Tensor | None
    attend: Callable[[Tensor], Tensor] = field(repr=False)

    def map(self, queries: Tensor | None = None) -> Tensor:
        """Weights (B, H, n, Nk) of the chosen queries int64 (n,), or of all, on every key.

        Every mechanism that is linear in the values has them: they are its output where the values are the unit
        vectors.
        """
        identity = torch.eye(self.k.shape[2])
        parts = []
        for columns in identity.split(MAP_COLUMNS, dim=1):
            out = self.attend(columns.expand(*self.k.shape[:2], -1, -1))
            parts.append(out if queries is None else out[:, :, queries])
        return torch.cat(parts, dim=-1)


@contextmanager
def recorded(mechanisms: Mapping[str, tuple[nn.Module, int]]) -> Iterator[list[Layer]]:
    """Fills the list with the calls of `mechanisms`, {name: (module, resolution)}, that are made inside the block."""
    layers: list[Layer] = []

    def hook(name: str, resolution: int) -> Callable[..., None]:
        def remember(module: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
            q, k, _, *rest = arguments
            projections = getattr(module, "projections", None)
            if projections is not None:  # they may be taken back after the call
                options = {"projections": projections} | options

            def attend(v: Tensor) -> Tensor:
                with torch.no_grad(), torch.random.fork_rng():
                    torch.manual_seed(0)  # what the mechanism draws itself is the same in every call
                    return module.forward(q, k, v, *rest, **options)

            layers.append(Layer(name, module, q, k, resolution, projections, attend))

        return remember

    handles = [
        module.register_forward_pre_hook(hook(name, resolution), with_kwargs=True)
        for name, (module, resolution) in mechanisms.items()
    ]
    try:
        yield layers
    finally:
        for handle in handles:
            handle.remove()


def add_network_flags(parser: CommandParser) -> Any:
    """The flags that `biggan_layers` reads; returns the group of --checkpoint, of which one flag must be given."""
    sources = parser.add_mutually_exclusive_group(required=True)
    sources.add_argument("--checkpoint", type=Path, help="of biggan: a file, a run directory or an export")
    parser.add_argument("--image", type=Path, help="show this image to the discriminator (default: generate one)")
    parser.add_argument("--seed", type=int, default=0, help="of the generated image and of the hash directions")
    parser.add_argument("--class", type=int, default=0, dest="label", help="class of the image")
    parser.add_argument("--weights", choices=("ema", "raw"), default="ema", help="the generator's weights")
    parser.add_argument("--layer", type=int, help="resolution of the layer to show (default: all)")
    return sources


def biggan_layers(
    arguments: Namespace, attention: AttentionConfig | None = None, num: int = 1
) -> tuple[Tensor, list[Layer]]:
    """Images, uint8 (num, 3, R, R), and the attention layers that made them; or the given image, and those that saw it.

    Args:
        attention: another mechanism or other options than the network was trained with.
        num: how many images to generate.

    Raises:
        UserError: what is wrong with the checkpoint, the image, the class or the mechanism; no attention, or none at
            the resolution that was asked for.
    """
    if arguments.image is None:
        images, layers = _generated(arguments, attention, num)
    else:
        images, layers = _seen(arguments, attention)
    if not layers:
        raise UserError(f"this network in {arguments.checkpoint} has no attention.")
    if arguments.layer is not None:
        resolutions = [layer.resolution for layer in layers]
        layers = [layer for layer in layers if layer.resolution == arguments.layer]
        if not layers:
            raise UserError(f"--layer {arguments.layer}: attention is at {', '.join(map(str, resolutions))}.")
    return images, layers


def _generated(arguments: Namespace, attention: AttentionConfig | None, num: int) -> tuple[Tensor, list[Layer]]:
    generator, _ = load_generator(arguments.checkpoint, arguments.weights, attention)
    labels = _check_class(arguments.label, generator.num_classes).expand(num)
    z = sampling.latents(0, num, generator.dim_z, arguments.seed)
    with recorded(_mechanisms(generator)) as layers:
        (images,) = sampling.generate(generator, z, labels, Device(), arguments.seed, batch_size=num)
    return images, layers


@torch.no_grad()
def _seen(arguments: Namespace, attention: AttentionConfig | None) -> tuple[Tensor, list[Layer]]:
    config, tree = read(arguments.checkpoint)
    if "discriminator" not in tree:
        raise UserError(f"{arguments.checkpoint} holds no discriminator, and no other network sees an --image.")
    if attention is not None:
        config = replace(config, attention=replace(config.attention, name=attention.name, options=attention.options))
    discriminator = build_discriminator(config)
    load_weights(discriminator, tree["discriminator"], "discriminator")
    label = _check_class(arguments.label, discriminator.num_classes)
    image = load_image(arguments.image, discriminator.resolution)
    use_projections(discriminator, draw_projections(discriminator, (), host_generator("attention", arguments.seed)))
    with recorded(_mechanisms(discriminator)) as layers:
        discriminator.eval()(image[None] / 127.5 - 1, label)
    return image[None], layers


def load_image(path: Path, resolution: int) -> Tensor:
    """uint8 (3, R, R), cropped to its central square; UserError where the file is no image."""
    try:
        return torch.from_numpy(square_rgb(open_image(path.read_bytes()), resolution))
    except OSError as error:
        raise UserError(f"--image {path}: {error.strerror}.") from None
    except DamagedImage as error:
        raise UserError(f"--image {path}: {error}.") from None


def _check_class(label: int, num_classes: int) -> Tensor:
    if not 0 <= label < num_classes:
        raise UserError(f"--class {label}: this network has the classes 0 to {num_classes - 1}.")
    return torch.tensor([label])


def _mechanisms(network: nn.Module) -> dict[str, tuple[nn.Module, int]]:
    stages = [stage for stage in network.blocks if stage.attention is not None]
    name = type(network).__name__.lower()
    return {
        f"{name}, {stage.resolution}x{stage.resolution}": (stage.attention.attention, stage.resolution)
        for stage in stages
    }
