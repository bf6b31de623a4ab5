"""The paddles that Pathfinder's snakes are made of: where each may follow another, what it covers, how it looks.

A plane of the picture is one Python integer with a bit a pixel: placing a paddle, or asking whether it would touch
another, is a shift and a bitwise operation on all pixels at once.

Shapes: P is the reach of a paddle in pixels; patches are (2P + 1, 2P + 1), centred on the anchor of the paddle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw
from scipy.ndimage import binary_dilation

from hrrformer.tasks.pathfinder_settings import Settings

_SCALE = 2  # shapes are drawn this many times larger and reduced: antialiasing
_COVERED, _SOLID = 0.5, 0.9  # shares of a pixel that the paddle and its margin cover


class Plane:
    """A picture as an integer: row by row, with `reach` pixels around it so that no patch crosses its edge."""

    def __init__(self, side: int, reach: int):
        self.side, self.reach, self.stride = side, reach, side + 2 * reach

    def bits(self, mask: np.ndarray) -> int:
        """A patch, bool (2P + 1, 2P + 1), or a whole plane, bool (stride, stride), as an integer."""
        rows = np.pad(mask, ((0, 0), (0, self.stride - mask.shape[1])))
        return int.from_bytes(np.packbits(rows, bitorder="little").tobytes(), "little")

    def shift(self, y: int, x: int) -> int:
        """`patch << shift(y, x)` is the plane with the patch centred on pixel (y, x)."""
        return y * self.stride + x

    def patch_shift(self, y: int, x: int) -> int:
        """The place of a pixel in a patch, given by its distance from the centre."""
        return (y + self.reach) * self.stride + x + self.reach

    def frame(self, width: int) -> np.ndarray:
        """bool (stride, stride): all but the inside of a frame of that width in the picture."""
        mask = np.ones((self.stride, self.stride), dtype=bool)
        first, last = self.reach + width, self.reach + self.side - width
        mask[first:last, first:last] = False
        return mask


@dataclass(frozen=True)
class Paddle:
    """A paddle in one direction, placed by its anchor: the tail of a snake's first paddle, the pivot of any other.

    Args:
        tip: (y, x) from the anchor to the end where the snake's marker would sit.
        next_pivot: (y, x) from the anchor to the pivot of the next paddle.
        solid: patch of the pixels that it and its margin fill; these must not overlap.
        covered: patch of the pixels that they fill for the greater part.
        near: patch of the pixels within another margin of those, where no other paddle may end.
        solid_shifts: the places of the pixels of `solid` in the patch.
        followers: (number of a paddle, the bit of its tip in a patch around its pivot, probability up to a factor).
        picture: float32 brightness of the paddle alone, centred on the tip.
    """

    tip: tuple[int, int]
    next_pivot: tuple[int, int]
    solid: int
    covered: int
    near: int
    solid_shifts: list[int]
    followers: list[tuple[int, int, float]]
    picture: np.ndarray


class PaddleSet:
    """All paddles of a set with one margin: `first` in whole degrees, `further` for each pixel of the circle.

    `frame` and `frame_near` are the planes of what is taken in an empty picture.
    """

    def __init__(self, settings: Settings, margin: int):
        self.settings, self.margin = settings, margin
        length = settings.paddle_length
        self.plane = Plane(settings.side, 2 * (length + margin) + math.ceil(settings.thickness) + 1)
        tips = _circle(length + margin)
        self._angles = [math.atan2(y, x) for y, x in tips]
        self._tips = tips
        self._first: dict[int, Paddle] = {}
        self.further = [self._paddle(angle, tip) for angle, tip in zip(self._angles, tips, strict=True)]
        frame = self.plane.frame(settings.padding)
        self.frame = self.plane.bits(frame)
        self.frame_near = self.plane.bits(self.plane.frame(0) | binary_dilation(frame, _disc(margin)))

    def first(self, degree: int) -> Paddle:
        if degree not in self._first:
            self._first[degree] = self._paddle(math.radians(degree), None)
        return self._first[degree]

    def _paddle(self, angle: float, tip: tuple[int, int] | None) -> Paddle:
        settings, margin, plane = self.settings, self.margin, self.plane
        length = settings.paddle_length
        if tip is None:  # drawn from the tail forward
            picture, cover = _line(settings, margin, angle)
            tip, to_next = (0, 0), length + margin
        else:  # drawn from the tip back to the pivot, which it does not reach by a margin
            picture, cover = _line(settings, margin, angle + math.pi)
            to_next = length + 2 * margin
        patch = np.zeros((2 * plane.reach + 1,) * 2, dtype=np.float32)
        half = len(cover) // 2
        top, left = plane.reach + tip[0] - half, plane.reach + tip[1] - half
        patch[top : top + len(cover), left : left + len(cover)] = cover
        solid, covered = patch >= _SOLID, patch >= _COVERED
        return Paddle(
            tip=tip,
            next_pivot=_polar(to_next, angle),
            solid=plane.bits(solid),
            covered=plane.bits(covered),
            near=plane.bits(binary_dilation(covered, _disc(margin))),
            solid_shifts=[int(y) * plane.stride + int(x) for y, x in np.argwhere(solid)],
            followers=self._followers(angle),
            picture=picture,
        )

    def _followers(self, angle: float) -> list[tuple[int, int, float]]:
        """p ~ cos^2(min(c * turn, pi / 2))."""
        found = []
        for number, (other, tip) in enumerate(zip(self._angles, self._tips, strict=True)):
            turn = abs((other - angle + math.pi) % (2 * math.pi) - math.pi)
            weight = math.cos(min(self.settings.continuity * turn, math.pi / 2)) ** 2
            if weight > 1e-6:
                found.append((number, 1 << self.plane.patch_shift(*tip), weight))
        return found


@cache
def paddle_set(settings: Settings, margin: int) -> PaddleSet:
    """Made once a process."""
    return PaddleSet(settings, margin)


@cache
def marker(radius: float) -> np.ndarray:
    """float32 (n, n): the brightness of a disc, centred."""
    half = math.ceil(radius) + 1
    ticks = np.arange(_SCALE * (2 * half + 1)) - _SCALE * half
    disc = np.hypot(ticks[:, None], ticks) <= _SCALE * radius
    return _reduce(disc, 2 * half + 1)


def _line(settings: Settings, margin: int, angle: float) -> tuple[np.ndarray, np.ndarray]:
    """Brightness of a paddle drawn from the centre, and share of each pixel that it and its margin cover."""
    half = settings.paddle_length + math.ceil(settings.thickness) + margin
    centre = _SCALE * half
    y, x = _polar(_SCALE * settings.paddle_length, angle)
    large = Image.new("L", (2 * centre + 1,) * 2)
    width = round(_SCALE * settings.thickness)
    ImageDraw.Draw(large).line([(centre, centre), (centre + x, centre + y)], fill=255, width=width)
    line = np.asarray(large) > 0
    return _reduce(line, 2 * half + 1), _reduce(binary_dilation(line, _disc(_SCALE * margin)), 2 * half + 1)


def _reduce(mask: np.ndarray, size: int) -> np.ndarray:
    """A bool picture made smaller with an antialiasing filter, float32 in [0, 1]."""
    small = Image.fromarray(mask.astype(np.float32)).resize((size, size), Image.Resampling.LANCZOS)
    return np.clip(np.asarray(small), 0, 1)


def _disc(radius: int) -> np.ndarray:
    ticks = np.arange(-radius, radius + 1)
    return ticks[:, None] ** 2 + ticks**2 <= radius**2


def _circle(radius: int) -> list[tuple[int, int]]:
    """(y, x) of the pixels on a circle, one for each pixel of its length."""
    count = math.ceil(2 * math.pi * radius)
    return sorted({_polar(radius, 2 * math.pi * step / count) for step in range(count)})


def _polar(distance: float, angle: float) -> tuple[int, int]:
    """(y, x), to the nearest pixel."""
    return round(distance * math.sin(angle)), round(distance * math.cos(angle))
