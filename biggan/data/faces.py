"""Cartoon faces drawn by the program: a data set that needs no files, every face a function of its index alone."""

from __future__ import annotations

import itertools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from biggan.data.dataset import ImageDataset
from biggan.data.shapes import Canvas, above, box, ellipse
from runtime.hashing import hash64, uniform

_STREAM = 0xFACE
_CHUNK_PIXELS = 1 << 16  # of the pictures drawn at once: a field of this many floats stays in the cache

_SKIN = ["ffe0c4", "f6cda8", "eebb90", "dfa377", "c68650", "a9683c", "86502e", "623a22"]
_HAIR = ["1c1512", "2e1d14", "4a2c18", "6f4424", "9a6330", "d9ac58", "efd48a", "b5482a", "8c2f1c", "a8a5a2", "e6e2dc",
         "3f5fa8", "c0508c"]  # fmt: skip
_EYES = ["3b2414", "5a3a1c", "2f6db0", "4b93c8", "3d8a52", "6f8f3a", "66707a"]
_CLOTH = ["d94f45", "3e76c4", "41a06a", "e8b23a", "7d58b0", "2c3440", "efefef", "e3804a", "3aa6a6", "8d4a5c"]
_BACKGROUND = ["8ecbe8", "f5d98c", "b5dfa5", "f3b0a6", "c9b6e6", "94d8cc", "f0f0ea", "6a89b8", "d8a6c4", "e0c4a0",
               "5f9c8c", "b8c4cc"]  # fmt: skip
_LIPS = ["b0483f", "a03a3a", "c25a55", "8f3f38", "c02f4a"]

# Hair styles. `line` and `curve`: the hairline y = line + curve * (x - part)^2 of the hair over the forehead, in head
# coordinates (the head is about 0.56 wide and 0.68 high from its centre); `volume`: how far it stands off the head;
# `back`: how far down the hair behind the head hangs; `knot`, `puffs`, `cloud`: a bun, two side buns, an afro.
_STYLE_FIELDS = ["front", "line", "curve", "part", "volume", "back", "knot", "puffs", "cloud", "weight"]
_STYLES = np.array(
    [
        [0, -0.60, 0.0, 0.00, 0.02, -0.9, 0, 0, 0, 1.0],  # bald
        [1, -0.44, 1.1, 0.00, 0.07, -0.9, 0, 0, 0, 2.0],  # short
        [1, -0.46, 0.7, 0.25, 0.12, -0.9, 0, 0, 0, 2.0],  # side parting
        [1, -0.24, 0.3, 0.00, 0.09, -0.9, 0, 0, 0, 1.5],  # fringe
        [1, -0.50, 2.0, 0.08, 0.11, 0.85, 0, 0, 0, 2.0],  # long
        [1, -0.25, 0.8, 0.00, 0.11, 0.42, 0, 0, 0, 1.5],  # bob with a fringe
        [1, -0.48, 1.5, 0.20, 0.12, 0.55, 0, 0, 0, 1.5],  # shoulder length, parted
        [1, -0.50, 1.3, 0.00, 0.05, -0.9, 1, 0, 0, 1.2],  # bun
        [1, -0.46, 1.2, 0.00, 0.06, -0.9, 0, 1, 0, 1.0],  # two buns
        [1, -0.42, 1.0, 0.00, 0.10, -0.9, 0, 0, 1, 1.2],  # afro
    ]
)


def _palette(colours: list[str]) -> np.ndarray:
    """float32 (n, 3) in [0, 1] from hexadecimal RGB."""
    return np.array([list(bytes.fromhex(colour)) for colour in colours], dtype=np.float32) / np.float32(255)


class _Traits:
    """Random traits of a batch of faces; the k-th trait asked for is a hash of (face index, k)."""

    def __init__(self, indices: np.ndarray):
        self.indices = indices[:, None, None]
        self._order = itertools.count()

    def between(self, low: float, high: float) -> np.ndarray:
        """float32 (B, 1, 1), uniform."""
        return (low + (high - low) * uniform(_STREAM, self.indices, next(self._order))).astype(np.float32)

    def chance(self, probability: float) -> np.ndarray:
        """float32 (B, 1, 1), 1 with the given probability, else 0."""
        return (uniform(_STREAM, self.indices, next(self._order)) < probability).astype(np.float32)

    def colour(self, palette: list[str], jitter: float = 0.03) -> np.ndarray:
        """float32 (B, 3, 1, 1): a colour of the palette, a little lighter or darker."""
        chosen = hash64(_STREAM, self.indices[:, 0, 0], next(self._order)) % np.uint64(len(palette))
        return np.clip(_palette(palette)[chosen][:, :, None, None] + self.between(-jitter, jitter)[:, None], 0, 1)

    def style(self) -> dict[str, np.ndarray]:
        """One row of the hair styles as {field: (B, 1, 1)}."""
        share = np.cumsum(_STYLES[:, -1]) / np.sum(_STYLES[:, -1])
        row = np.searchsorted(share, uniform(_STREAM, self.indices, next(self._order)), side="right")
        return {name: _STYLES[row, column].astype(np.float32) for column, name in enumerate(_STYLE_FIELDS)}


def _draw(indices: np.ndarray, resolution: int) -> np.ndarray:
    """uint8 (B, 3, R, R): the faces of the given indices, painted from back to front."""
    traits = _Traits(indices)
    canvas = Canvas(len(indices), resolution * (2 if resolution <= 64 else 1))
    style = traits.style()
    skin, hair = traits.colour(_SKIN), traits.colour(_HAIR)
    light = traits.between(-0.22, 0.22)  # the side the light comes from

    # Background: two colours from top to bottom.
    mix = (canvas.y + 1)[:, None] / 2
    canvas.pixels[:] = (1 - mix) * traits.colour(_BACKGROUND) + mix * traits.colour(_BACKGROUND)

    # Head coordinates: (0, 0) is the middle of the head. Rotation by t = tan(angle / 2), free of sin and cos.
    tangent, scale = traits.between(-0.07, 0.07), traits.between(0.98, 1.10)
    cosine, sine = (1 - tangent * tangent) / (1 + tangent * tangent), 2 * tangent / (1 + tangent * tangent)
    shift_x, shift_y = canvas.x - traits.between(-0.07, 0.07), canvas.y - traits.between(-0.03, 0.07)
    x, y = (cosine * shift_x + sine * shift_y) / scale, (cosine * shift_y - sine * shift_x) / scale
    width, height = traits.between(0.50, 0.58), traits.between(0.62, 0.70)
    jaw = x * (1 + traits.between(0.0, 0.22) * y)  # narrower towards the chin
    head = ellipse(jaw, y, width, height)
    bulge = np.square(jaw / width) + np.square(y / height)
    shade = 1 + light * jaw / width - 0.16 * np.clip(bulge - 0.45, 0, 1)  # lit from one side, darker at the edge
    lit_skin = np.clip(skin * shade[:, None], 0, 1)
    lit_hair = np.clip(hair * (1.05 + 0.5 * light * x - 0.35 * y)[:, None] + 0.04, 0, 1)
    dark_skin = skin * np.array([0.72, 0.62, 0.58], dtype=np.float32)[:, None, None]
    neck_skin = skin * np.array([0.84, 0.77, 0.74], dtype=np.float32)[:, None, None]

    # Behind the head: hair, neck and shoulders.
    volume = style["volume"] + traits.between(-0.015, 0.03)
    bottom = style["back"] + traits.between(-0.06, 0.06)
    hanging = box(x, y - (bottom - 0.78) / 2, width + volume, (bottom + 0.78) / 2, 0.5)
    canvas.paint(hanging, lit_hair * 0.82, style["back"] > 0)
    canvas.paint(ellipse(x, y + 0.16, width + 0.26, height + 0.10), lit_hair, style["cloud"])
    canvas.paint(ellipse(x, y + height + 0.12, 0.23, 0.19), lit_hair, style["knot"])
    canvas.paint(ellipse(np.abs(x) - width * 0.86, y + height * 0.78, 0.22, 0.22), lit_hair, style["puffs"])
    cloth = traits.colour(_CLOTH)
    canvas.paint(box(shift_x, shift_y - 0.75, 0.21, 0.42, 0.05), neck_skin)
    shoulders = ellipse(shift_x, shift_y - 1.25, traits.between(0.72, 0.95), 0.52)
    canvas.paint(shoulders, cloth * (0.95 + light * shift_x)[:, None])
    canvas.paint(ellipse(shift_x, shift_y - 0.74, 0.22, 0.14), neck_skin, traits.chance(0.6))

    # Ears and head.
    canvas.paint(ellipse(np.abs(x) - width, y - 0.03, 0.10, 0.15), lit_skin * 0.92)
    canvas.paint(ellipse(np.abs(x) - width - 0.02, y - 0.03, 0.045, 0.08), dark_skin)
    canvas.paint(head, lit_skin)

    # The face turns a little: everything on it moves together.
    x = x - traits.between(-0.07, 0.07)
    side = np.abs(x)
    cheeks = np.clip(skin * np.array([1.08, 0.78, 0.74], dtype=np.float32)[:, None, None], 0, 1)
    canvas.paint(ellipse(side - 0.31, y - 0.24, 0.10, 0.08), cheeks, traits.between(0.0, 0.7), blur=0.12)

    # Beard and moustache, under the mouth and the nose.
    no_back_hair = (style["back"] < 0).astype(np.float32)
    beard = traits.chance(0.32) * no_back_hair
    below_line = above(-y, 0.75 * x * x - 0.30, 1.5 * x)
    stubble_or_full = 0.45 + 0.55 * traits.chance(0.7)
    canvas.paint(np.maximum(head - 0.02, below_line), lit_hair, beard * stubble_or_full)
    moustache = np.maximum(beard * traits.chance(0.7), no_back_hair * traits.chance(0.12))
    canvas.paint(ellipse(side - 0.11, y - 0.285 - 0.25 * side, 0.13, 0.055), lit_hair * 0.9, moustache)

    _paint_eyes(canvas, traits, x, y, hair)
    nose_y, nose_width = 0.14 + traits.between(-0.02, 0.04), traits.between(0.065, 0.115)
    canvas.paint(ellipse(x, y - nose_y, nose_width, 0.06), dark_skin, 0.75)
    canvas.paint(ellipse(x, y - nose_y + 0.05, nose_width * 0.8, 0.08), lit_skin)
    _paint_mouth(canvas, traits, x, y - 0.41)

    # Hair over the forehead, and sometimes a hat on it.
    part = style["part"] * (2 * traits.chance(0.5) - 1)
    across = x - part
    curve = style["curve"] * traits.between(0.8, 1.2)
    hairline = style["line"] + traits.between(-0.03, 0.05) + curve * np.minimum(across * across, 0.35)
    hairline += 3 * np.maximum(np.abs(x) - 0.75 * width, 0)  # falls in front of the ears
    crown = ellipse(jaw, y + 0.03, width + volume, height + volume)
    fringe = np.maximum(np.maximum(crown, above(y, hairline, 2 * curve * across)), y - np.maximum(bottom, 0.0))
    canvas.paint(fringe, lit_hair, style["front"])
    hat = traits.chance(0.10) * (1 - style["cloud"]) * (1 - style["knot"]) * (1 - style["puffs"])
    brim = -0.40 + 0.15 * x * x
    hat_colour = traits.colour(_CLOTH)
    canvas.paint(np.maximum(ellipse(x, y + 0.08, width + 0.12, height + 0.13), above(y, brim)), hat_colour, hat)
    canvas.paint(np.maximum(np.abs(y - brim) - 0.075, np.abs(x) - width - 0.11), hat_colour * 0.75, hat)
    return canvas.to_uint8(resolution)


def _paint_eyes(canvas: Canvas, traits: _Traits, x: np.ndarray, y: np.ndarray, hair: np.ndarray) -> None:
    """Eyes, brows and glasses, mirrored about x = 0 (the gaze is not)."""
    apart, eye_y = traits.between(0.21, 0.26), traits.between(-0.08, -0.02)
    radius_x, radius_y = traits.between(0.115, 0.155), traits.between(0.08, 0.15)
    from_eye, level = np.abs(x) - apart, y - eye_y
    white = ellipse(from_eye, level, radius_x, radius_y)
    black = np.full((1, 3, 1, 1), 0.07, dtype=np.float32)
    canvas.paint(white - 0.025, black, 0.8)
    canvas.paint(white, np.full_like(black, 0.98))
    gaze_x = np.where(x < 0, x + apart, x - apart) - traits.between(-0.035, 0.035)
    gaze_y = level - traits.between(-0.02, 0.03)
    canvas.paint(np.maximum(ellipse(gaze_x, gaze_y, 0.085, 0.085), white), traits.colour(_EYES))
    canvas.paint(np.maximum(ellipse(gaze_x, gaze_y, 0.045, 0.045), white), black)
    canvas.paint(ellipse(gaze_x + 0.03, gaze_y + 0.035, 0.025, 0.025), np.ones_like(black), 0.9)

    brow_y = level + radius_y + traits.between(0.07, 0.13) - from_eye * traits.between(-0.35, 0.35)
    brow = box(from_eye, brow_y, 0.145, traits.between(0.020, 0.045), 0.02)
    canvas.paint(brow, hair * 0.6)

    glasses, dark_lens = traits.chance(0.22), traits.chance(0.25)
    rim = ellipse(from_eye, level, 0.195, 0.185)
    rim += traits.chance(0.5) * (box(from_eye, level, 0.195, 0.155, 0.06) - rim)  # round or square
    frame = traits.colour(["17171c", "4a2c1c", "7a1f2b", "27406b"])
    canvas.paint(rim, black, glasses * dark_lens * 0.9)
    canvas.paint(np.abs(rim) - 0.025, frame, glasses)
    canvas.paint(box(x, level + 0.03, apart - 0.19, 0.022, 0.01), frame, glasses)


def _paint_mouth(canvas: Canvas, traits: _Traits, x: np.ndarray, y: np.ndarray) -> None:
    """One of: a line that smiles, frowns or does neither; an open laugh with teeth; a small round mouth."""
    lips, kind, width = traits.colour(_LIPS), traits.between(0, 1), traits.between(0.15, 0.24)
    smile, other = traits.between(0.35, 0.6), traits.between(-0.3, 0.15)
    bend = width * np.where(kind < 0.35, smile, other)
    curve = bend * (0.5 - np.square(x / width))
    line = np.maximum(np.abs(above(y, curve, 2 * bend * x / (width * width))) - 0.028, np.abs(x) - width)
    canvas.paint(line, lips * 0.8, kind < 0.55)

    laughs = (kind >= 0.55) & (kind < 0.9)
    depth = traits.between(0.13, 0.22)
    floor = depth * (1 - np.square(x / width)) - 0.06
    opening = np.maximum(above(y, floor, 2 * depth * x / (width * width)), -0.06 - y)
    canvas.paint(opening - 0.025, lips, laughs)
    canvas.paint(opening, np.array([0.35, 0.07, 0.08], dtype=np.float32)[None, :, None, None], laughs)
    canvas.paint(np.maximum(opening, y), np.full((1, 3, 1, 1), 0.97, dtype=np.float32), laughs)

    gasp = ellipse(x, y, width * 0.45, depth * 0.5)
    canvas.paint(gasp - 0.03, lips, kind >= 0.9)
    canvas.paint(gasp, lips * 0.35, kind >= 0.9)


def draw_face(index: int, resolution: int = 32) -> np.ndarray:
    """One cartoon face, uint8 (3, R, R); the same bytes for the same index on every machine.

    Raises:
        ValueError: a negative index, or fewer than 8 pixels.
    """
    if index < 0 or resolution < 8:
        raise ValueError(f"draw_face needs index >= 0 and resolution >= 8, got {index} and {resolution}")
    return _draw(np.array([index]), resolution)[0]


def drawn_faces(resolution: int, count: int) -> ImageDataset:
    """The faces of the indices 0 .. count - 1, one class.

    Raises:
        ValueError: fewer than 1 face or 8 pixels.
    """
    if count < 1 or resolution < 8:
        raise ValueError(f"drawn_faces needs count >= 1 and resolution >= 8, got {count} and {resolution}")
    chunk = max(1, _CHUNK_PIXELS // (2 * resolution) ** 2)
    images = np.empty((count, 3, resolution, resolution), dtype=np.uint8)

    def draw_chunk(start: int) -> None:
        images[start : start + chunk] = _draw(np.arange(start, min(start + chunk, count)), resolution)

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # numpy releases the interpreter lock
        list(pool.map(draw_chunk, range(0, count, chunk)))
    return ImageDataset(
        torch.from_numpy(images),
        source=f"{count:,} drawn faces",
        class_names=["face"],
        fingerprint=f"drawn-faces-v1-{count}x{resolution}",
    )
