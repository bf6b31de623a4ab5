"""Pictures of attention weights: what each head looks at in a picture that the network saw as a sequence of pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

# Dark blue over green to yellow: light grows with the weight, also for the colour-blind and in grey print.
ANCHORS = np.array([[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]], dtype=np.float64)
PANEL = 192  # least width of a drawn picture, in pixels
GAP, LINE, TEXT = 12, 22, 15  # between panels; height of a line of text; height of its letters
INK, PAPER = (32, 32, 32), (255, 255, 255)


def draw_heatmaps(tokens: Tensor, weights: Tensor, captions: Sequence[str]) -> Image.Image:
    """A row for each example: the input, then a map of the weights of each head.

    Weights are shown as multiples of 1/T, what all would be if they were equal. Each map uses the whole colour bar;
    the line above it gives its ends.

    Args:
        tokens: int (B, T), the pixels, 0..255, row by row; T is a square.
        weights: (B, H, T), each (b, h) with sum 1.
        captions: B lines, each written above its row.

    Raises:
        ValueError: shapes that contradict each other, or T is no square.
    """
    batch, heads, length = weights.shape
    side = math.isqrt(length)
    if side * side != length or tokens.shape != (batch, length) or len(captions) != batch:
        raise ValueError(
            f"needs tokens (B, T), weights (B, H, T) and B captions with T a square; got {tuple(tokens.shape)}, "
            f"{tuple(weights.shape)} and {len(captions)}"
        )
    scale = -(-PANEL // side)
    panel = side * scale
    row_height = 2 * LINE + panel + GAP
    width = GAP + (1 + heads) * (panel + GAP)
    sheet = Image.new("RGB", (width, GAP + batch * row_height + 2 * LINE), PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(TEXT)
    pictures = tokens.cpu().clamp(0, 255).to(torch.uint8).view(batch, side, side).numpy()
    maps = (weights.detach().float().cpu() * length).view(batch, heads, side, side).numpy()
    for row in range(batch):
        top = GAP + row * row_height
        draw.text((GAP, top), captions[row], INK, font)
        titles = [
            "input",
            *(f"head {h + 1}: {maps[row, h].min():.2f} - {maps[row, h].max():.2f}" for h in range(heads)),
        ]
        panels = [np.repeat(pictures[row][..., None], 3, axis=-1), *map(_colours, maps[row])]
        for column, (title, pixels) in enumerate(zip(titles, panels, strict=True)):
            left = GAP + column * (panel + GAP)
            draw.text((left, top + LINE), title, INK, font)
            enlarged = Image.fromarray(pixels).resize((panel, panel), Image.Resampling.NEAREST)
            sheet.paste(enlarged, (left, top + 2 * LINE))
    _draw_colour_bar(sheet, draw, font, top=GAP + batch * row_height)
    return sheet


def _colours(values: np.ndarray) -> np.ndarray:
    """(S, S) -> uint8 (S, S, 3): the least value dark, the largest light; equal ones all dark."""
    low, high = values.min(), values.max()
    place = (values - low) / max(high - low, 1e-12) * (len(ANCHORS) - 1)
    channels = [np.interp(place, range(len(ANCHORS)), ANCHORS[:, channel]) for channel in range(3)]
    return np.stack(channels, axis=-1).round().astype(np.uint8)


def _draw_colour_bar(sheet: Image.Image, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont, top: int) -> None:
    bar = Image.fromarray(_colours(np.linspace(0, 1, PANEL)[None].repeat(LINE - 6, axis=0)))
    sheet.paste(bar, (GAP, top))
    draw.text((GAP + PANEL + GAP, top - 2), "least to most; 1 = every pixel alike", INK, font)
