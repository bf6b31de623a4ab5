"""Where chosen pixels of an image look: the attention maps of a BigGAN checkpoint, as in the SAGAN paper's figures.

    python -m tools.visualize_attention --checkpoint runs/demo --out maps.png
    python -m tools.visualize_attention --checkpoint runs/demo --out maps.png --pixels 16,6 12,15 27,28
    python -m tools.visualize_attention --checkpoint runs/demo --out maps.png --image face.png

A pixel is COLUMN,ROW from the upper left corner of the image. The image is generated, and the generator's layers are
shown; or it is given, and the discriminator's are. A column for each pixel; a row for each layer, and where its
mechanism is not dense another one for the softmax over all keys of the same queries and keys. Maps are enlarged to the
image; each uses the whole range of colours, from no weight to the largest, which is written above it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.cli import CommandParser, run_command  # isort: skip: before torch, for it makes idle threads sleep

import torch
from torch import Tensor

from attention import DenseAttention
from biggan.commands.attention_flags import add_attention_flag, choose_attention, parse_with_options
from runtime.errors import UserError
from tools.attention_layers import (
    Layer,
    add_network_flags,
    biggan_layers,
)
from tools.plotting import check_png, pyplot, save


def parse_pixels(texts: Sequence[str] | None, resolution: int) -> list[tuple[int, int]]:
    """(column, row) pairs from texts like '3,17'; None takes four on the image's upper middle, centre and lower edge.

    Raises:
        UserError: no two numbers, or a pixel outside the image.
    """
    if texts is None:
        r = resolution
        return [(r // 2, r // 5), (r * 3 // 8, r * 7 // 16), (r // 2, r * 3 // 4), (r // 10, r // 10)]
    pixels = []
    for text in texts:
        try:
            column, row = (int(part) for part in text.split(","))
        except ValueError:
            raise UserError(f"--pixels: expected COLUMN,ROW such as 3,17, got '{text}'.") from None
        if not (0 <= column < resolution and 0 <= row < resolution):
            raise UserError(f"--pixels {text}: the image has {resolution} columns and rows, numbered from 0.")
        pixels.append((column, row))
    return pixels


def pixel_maps(layer: Layer, pixels: Sequence[tuple[int, int]], resolution: int) -> Tensor:
    """The weights of the layer's queries at `pixels` of an image of this resolution: (P, S/2, S/2), each of sum 1."""
    side = layer.resolution
    tokens = [row * side // resolution * side + column * side // resolution for column, row in pixels]
    return layer.map(torch.tensor(tokens))[0, 0].unflatten(1, (side // 2, side // 2))


def dense_twin(layer: Layer) -> Layer:
    """The same queries and keys under the softmax over all keys."""
    dense = DenseAttention(getattr(layer.mechanism, "scale", 1.0))
    return Layer(layer.name, dense, layer.q, layer.k, layer.resolution, None, lambda v: dense(layer.q, layer.k, v))


def draw(image: Tensor, pixels: Sequence[tuple[int, int]], rows: Sequence[tuple[str, Tensor]], out: Path) -> None:
    """`rows` are titles and maps (P, S/2, S/2) for the pixels of an image, uint8 (3, R, R)."""
    plt = pyplot()
    resolution = image.shape[1]
    shape = len(rows), len(pixels) + 1
    size = {"figsize": (2.5 * shape[1], 2.85 * shape[0])}
    figure, axes = plt.subplots(*shape, squeeze=False, layout="constrained", **size)
    colours = [f"C{i}" for i in range(len(pixels))]
    edges = (-0.5, resolution - 0.5, resolution - 0.5, -0.5)
    for line, (title, maps) in zip(axes, rows, strict=True):
        line[0].imshow(image.permute(1, 2, 0).numpy())
        line[0].set_title(title, fontsize=9)
        for i, (pixel, colour) in enumerate(zip(pixels, colours, strict=True)):
            _mark(line[0], pixel, colour)
            weights = maps[i].numpy()
            line[i + 1].imshow(weights, extent=edges, cmap="inferno", vmin=0, interpolation="nearest")
            largest = f"largest weight {weights.max():.1%}"
            line[i + 1].set_title(f"pixel {pixel[0]},{pixel[1]}: {largest}", fontsize=9, color=colour)
            _mark(line[i + 1], pixel, colour)
        for axis in line:
            axis.set(xticks=[], yticks=[], xlim=edges[:2], ylim=edges[2:])
    save(figure, out)


def _mark(axis: Any, pixel: tuple[int, int], colour: str) -> None:
    axis.plot(*pixel, marker="o", markersize=9, color=colour, markeredgecolor="white", markeredgewidth=1.5)


def main(argv: Sequence[str]) -> None:
    parser = CommandParser(prog="python -m tools.visualize_attention", description=__doc__.splitlines()[0])
    add_network_flags(parser)
    add_attention_flag(parser)
    parser.add_argument("--pixels", nargs="+", metavar="COLUMN,ROW", help="query pixels (default: four)")
    parser.add_argument("--out", type=Path, required=True, help="picture to write, NAME.png")
    arguments, options = parse_with_options(parser, argv)
    check_png(arguments.out)
    attention = choose_attention(arguments.checkpoint, arguments.attention, options)
    (image,), layers = biggan_layers(arguments, attention)
    pixels = parse_pixels(arguments.pixels, image.shape[1])
    shown = []
    for layer in layers:
        shown += [layer] if layer.mechanism.name == "dense" else [layer, dense_twin(layer)]
    rows = [(f"{layer.name}, {layer.mechanism.name}", pixel_maps(layer, pixels, image.shape[1])) for layer in shown]
    draw(image, pixels, rows, arguments.out)
    print(f"{len(pixels)} pixels, {len(layers)} layer(s): {arguments.out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
