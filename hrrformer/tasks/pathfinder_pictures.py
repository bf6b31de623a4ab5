"""Pathfinder pictures: two long snakes, short distractors, and two markers on the same snake or on different ones."""

from __future__ import annotations

from random import Random

import numpy as np

from hrrformer.tasks.pathfinder_paddles import marker, paddle_set
from hrrformer.tasks.pathfinder_settings import Settings
from hrrformer.tasks.pathfinder_snakes import Snake, grow_distractors, grow_pair
from runtime.hashing import hash64

VERSION = 1  # of the pictures that a seed gives

_STREAM = 0x9A7F
_BORDER = 16  # empty pixels around the picture while shapes are laid on it


def draw_picture(settings: Settings, seed: int, index: int) -> tuple[np.ndarray, int, int]:
    """Picture number `index` of a seed; a function of the three arguments alone.

    Returns:
        uint8 (side, side); the label, 1 where one snake joins the markers; the margin of its paddles.
    """
    random = Random(int(hash64(seed, _STREAM, settings.side, settings.contour_length, index)))
    label = int(random.random() * 2)
    margin = settings.margins[int(random.random() * len(settings.margins))]
    board, pair = grow_pair(paddle_set(settings, margin), random)
    distractors = grow_distractors(board, random)

    canvas = np.zeros((settings.side + 2 * _BORDER,) * 2, dtype=np.float32)
    for snake in pair:
        _lay_snake(canvas, snake, settings.snake_contrast * settings.paddle_contrast)
    for snake in distractors:
        _lay_snake(canvas, snake, settings.snake_contrast)
    first = int(random.random() * 2)
    second = first if label else 1 - first
    for y, x in (pair[first].ends[0], pair[second].ends[1]):
        _lay(canvas, marker(settings.marker_radius), y, x)

    picture = canvas[_BORDER:-_BORDER, _BORDER:-_BORDER]
    stretched = (picture - picture.min()) * (255 / (picture.max() - picture.min()))
    return np.floor(stretched + 0.5).astype(np.uint8), label, margin


def _lay_snake(canvas: np.ndarray, snake: Snake, contrast: float) -> None:
    for paddle, y, x in snake.paddles:
        _lay(canvas, paddle.picture * np.float32(contrast), y + paddle.tip[0], x + paddle.tip[1])


def _lay(canvas: np.ndarray, shape: np.ndarray, y: int, x: int) -> None:
    """Brightness (n, n) centred on a pixel; the brighter of it and what is there stays."""
    top, left = y + _BORDER - len(shape) // 2, x + _BORDER - len(shape) // 2
    part = canvas[top : top + len(shape), left : left + len(shape)]
    np.maximum(part, shape, out=part)
