"""Drawn digits: an image task that needs no files, to try a model on in minutes.

Each picture is one digit of a few light strokes on a darker ground; place, size, slant, turn, stroke width, brightness
and noise vary. It is much easier than CIFAR-10 and says nothing about it. Picture number i of a seed is a function of
(seed, i); only + - * / and sqrt are used, so it has the same bytes everywhere.
"""

from __future__ import annotations

import numpy as np

from runtime.hashing import hash64, uniform

_STREAM = 0xD161

# Strokes of each digit in a box with x to the right and y down, both 0 to 1.
_LOOP = [(0.5, 0), (0.2, 0.1), (0.05, 0.5), (0.2, 0.9), (0.5, 1), (0.8, 0.9), (0.95, 0.5), (0.8, 0.1), (0.5, 0)]
_SIX = [(0.8, 0), (0.4, 0.2), (0.1, 0.65), (0.25, 0.95), (0.65, 1), (0.9, 0.75), (0.7, 0.5), (0.3, 0.5), (0.12, 0.7)]
_STROKES = [
    _LOOP,
    [(0.25, 0.25), (0.55, 0), (0.55, 1)],
    [(0.08, 0.25), (0.25, 0.04), (0.6, 0), (0.88, 0.2), (0.8, 0.45), (0.08, 1), (0.92, 1)],
    [(0.1, 0.08), (0.5, 0), (0.85, 0.18), (0.75, 0.42), (0.4, 0.48), (0.8, 0.55), (0.9, 0.78), (0.6, 1), (0.1, 0.92)],
    [(0.68, 1), (0.68, 0), (0.05, 0.68), (0.95, 0.68)],
    [(0.88, 0), (0.2, 0), (0.15, 0.45), (0.55, 0.38), (0.9, 0.6), (0.8, 0.92), (0.45, 1), (0.1, 0.9)],
    _SIX,
    [(0.08, 0), (0.92, 0), (0.4, 1)],
    [(0.5, 0.46), (0.2, 0.26), (0.5, 0), (0.8, 0.26), (0.5, 0.46), (0.1, 0.74), (0.5, 1), (0.9, 0.74), (0.5, 0.46)],
    [(1 - x, 1 - y) for x, y in _SIX],
]


def _segments() -> np.ndarray:
    """float32 (10, S, 2, 2): start and end of each segment around the middle of the box; the last one repeats."""
    longest = max(map(len, _STROKES)) - 1
    padded = [strokes + strokes[-1:] * (longest + 1 - len(strokes)) for strokes in _STROKES]
    points = np.array(padded, dtype=np.float32) - np.float32(0.5)
    return np.stack([points[:, :-1], points[:, 1:]], axis=2)


_SEGMENTS = _segments()


def draw_digits(seed: int, side: int, indices: range) -> tuple[np.ndarray, np.ndarray]:
    """The pictures of the given numbers, uint8 (B, side, side), and the digits they show, int64 (B,)."""
    index = np.array(indices)
    labels = (hash64(seed, _STREAM, index, 0) % np.uint64(10)).astype(np.int64)

    def between(trait: int, low: float, high: float) -> np.ndarray:  # (B, 1, 1)
        return (low + (high - low) * uniform(seed, _STREAM, index, trait)).astype(np.float32)[:, None, None]

    # The corners of the strokes, in a picture that reaches from -1 to 1.
    height = between(1, 1.1, 1.5)
    x, y = np.moveaxis(_SEGMENTS[labels], -1, 0)  # each (B, S, 2)
    x, y = x * height * between(2, 0.55, 0.8), y * height
    x = x + y * between(3, -0.2, 0.2)
    turn = between(4, -0.1, 0.1)  # tangent of half the angle
    cosine, sine = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    x, y = cosine * x - sine * y + between(5, -0.2, 0.2), sine * x + cosine * y + between(6, -0.15, 0.15)

    # Distance of every pixel to the nearest segment: project on the segment, clip to its ends.
    ticks = ((2 * np.arange(side) + 1) / side - 1).astype(np.float32)
    pixel_x, pixel_y = np.tile(ticks, side), np.repeat(ticks, side)  # (P,), P = side * side
    ink = np.full((len(index), side * side), np.float32(4))
    for segment in range(x.shape[1]):
        ax, ay = x[:, segment, :1], y[:, segment, :1]  # (B, 1)
        dx, dy = x[:, segment, 1:] - ax, y[:, segment, 1:] - ay
        along = ((pixel_x - ax) * dx + (pixel_y - ay) * dy) / (dx * dx + dy * dy + np.float32(1e-6))
        along = np.clip(along, 0, 1)
        np.minimum(ink, np.square(pixel_x - ax - along * dx) + np.square(pixel_y - ay - along * dy), out=ink)
    edge = np.float32(2 / side)
    cover = np.clip(np.float32(0.5) + (between(7, 0.08, 0.16)[:, 0] - np.sqrt(ink)) / edge, 0, 1)  # antialiased

    ground, light = between(8, 0.05, 0.3)[:, 0], between(9, 0.6, 0.95)[:, 0]
    noise = uniform(seed, _STREAM, index[:, None], 10 + np.arange(side * side)).astype(np.float32) - np.float32(0.5)
    picture = ground + (light - ground) * cover + noise * np.float32(0.16)
    pixels = np.floor(np.clip(picture, 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
    return pixels.reshape(-1, side, side), labels
