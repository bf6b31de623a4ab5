"""A batch of pictures, painted with antialiased shapes that are given as signed distance fields.

Only + - * / sqrt, comparisons and clipping are used: IEEE 754 rounds them alike everywhere, so the pictures have the
same bytes on every machine. All fields are float32 (B, H, W) or broadcast to it; distances are negative inside.

Source of the distance functions: Inigo Quilez, "2D distance functions".
"""

from __future__ import annotations

import numpy as np

Width = np.ndarray | float  # one number, or one a picture: (B, 1, 1)


def ellipse(x: np.ndarray, y: np.ndarray, radius_x: Width, radius_y: Width) -> np.ndarray:
    """Ellipse at the origin; first-order distance, exact on the edge."""
    u, v = x / radius_x, y / radius_y
    length = np.sqrt(u * u + v * v)
    u, v = u / radius_x, v / radius_y
    return length * (length - 1) / (np.sqrt(u * u + v * v) + 1e-6)


def box(x: np.ndarray, y: np.ndarray, half_x: Width, half_y: Width, corner: float) -> np.ndarray:
    """Rectangle at the origin with corners rounded by radius `corner`."""
    u, v = np.abs(x) - half_x + corner, np.abs(y) - half_y + corner
    outside_u, outside_v = np.maximum(u, 0), np.maximum(v, 0)
    return np.sqrt(outside_u * outside_u + outside_v * outside_v) + np.minimum(np.maximum(u, v), 0) - corner


def above(y: np.ndarray, curve: np.ndarray, slope: np.ndarray | float = 0.0) -> np.ndarray:
    """The side of a curve y = f(x) towards smaller y (up in a picture); `slope` is f'(x)."""
    return (y - curve) / np.sqrt(1 + np.square(slope))


class Canvas:
    """B square pictures with coordinates x (to the right) and y (down) in [-1, 1]."""

    def __init__(self, count: int, size: int):
        ticks = ((2 * np.arange(size) + 1) / size - 1).astype(np.float32)
        self.x = np.broadcast_to(ticks[None, None, :], (count, size, size))
        self.y = np.broadcast_to(ticks[None, :, None], (count, size, size))
        self.size = size
        self.pixels = np.zeros((count, 3, size, size), dtype=np.float32)  # RGB in [0, 1]

    def paint(
        self, distance: np.ndarray, colour: np.ndarray, opacity: np.ndarray | float = 1.0, blur: float = 0.0
    ) -> None:
        """Lay a shape over the pictures.

        Args:
            distance: (B, H, W), negative inside.
            colour: (B, 3, 1, 1) or (B, 3, H, W) RGB.
            opacity: (B, 1, 1); 0 leaves a picture as it is.
            blur: width of the soft edge beyond the one of antialiasing, in coordinates.
        """
        edge = 2 / self.size + blur
        cover = np.clip(0.5 - distance / np.float32(edge), 0, 1) * np.asarray(opacity, dtype=np.float32)  # (B, H, W)
        self.pixels += (colour - self.pixels) * cover[:, None]

    def to_uint8(self, resolution: int) -> np.ndarray:
        """uint8 (B, 3, R, R), each pixel the mean of the size / R squared samples under it."""
        factor = self.size // resolution
        total = sum(self.pixels[:, :, row::factor, column::factor] for row in range(factor) for column in range(factor))
        return np.floor(np.clip(total / (factor * factor), 0, 1) * 255 + np.float32(0.5)).astype(np.uint8)
