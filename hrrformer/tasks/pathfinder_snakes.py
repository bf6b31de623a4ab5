"""How Pathfinder's snakes grow: two of full length side by side, then short ones where there is room.

Source: Linsley et al. 2018, arXiv:1805.08315, and the program that came with it. Unlike there, a paddle keeps clear of
the newest paddle of the other snake too, so that snakes never cross; and the shares of pixels that paddles cover are
cut to yes or no.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

from hrrformer.tasks.pathfinder_paddles import Paddle, PaddleSet

_TRIES = 3  # for a place of a paddle
_DISTRACTOR_TRIES = 5

Placed = tuple[Paddle, int, int]  # a paddle and the pixel (y, x) of its anchor


@dataclass
class Snake:
    """Its paddles from the first on, and the planes of the newest, which its successor may touch."""

    paddles: list[Placed]
    solid: int
    near: int

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """The pixels (y, x) of its first tip and its last."""
        (first, y, x), (last, v, u) = self.paddles[0], self.paddles[-1]
        return (y + first.tip[0], x + first.tip[1]), (v + last.tip[0], u + last.tip[1])


@dataclass
class Board:
    """What is taken: the planes of all paddles but the newest of snakes that still grow."""

    paddles: PaddleSet
    solid: int
    near: int
    covered: int

    @classmethod
    def empty(cls, paddles: PaddleSet) -> Board:
        return cls(paddles, paddles.frame, paddles.frame_near, paddles.frame)

    def start(self, paddle: Paddle, y: int, x: int) -> Snake:
        shift = self.paddles.plane.shift(y, x)
        return Snake([(paddle, y, x)], paddle.solid << shift, paddle.near << shift)

    def extend(self, snake: Snake, other: Snake | None, random: Random) -> bool:
        """Adds a paddle; False where there is no room, or none was found."""
        plane, further = self.paddles.plane, self.paddles.further
        last, y, x = snake.paddles[-1]
        y, x = y + last.next_pivot[0], x + last.next_pivot[1]
        if not (0 <= y < plane.side and 0 <= x < plane.side):
            return False
        shift = plane.shift(y, x)
        solid = (self.solid | other.solid if other else self.solid) >> shift
        near = (self.near | other.near if other else self.near) >> shift
        free = [(number, weight) for number, bit, weight in last.followers if not near & bit]
        total = sum(weight for _, weight in free)
        if total < 1e-4:
            return False
        for _ in range(_TRIES):
            rest = random.random() * total
            for number, weight in free:  # noqa: B007 (the last one looked at is the one drawn)
                rest -= weight
                if rest < 0:
                    break
            if not solid & further[number].solid:
                self.solid |= snake.solid
                self.near |= snake.near
                snake.paddles.append((further[number], y, x))
                snake.solid, snake.near = further[number].solid << shift, further[number].near << shift
                return True
        return False

    def finish(self, snake: Snake) -> None:
        """Takes in the newest paddle too, and what the whole snake covers."""
        self.solid |= snake.solid
        self.near |= snake.near
        for paddle, y, x in snake.paddles:
            self.covered |= paddle.covered << self.paddles.plane.shift(y, x)


def grow_pair(paddles: PaddleSet, random: Random) -> tuple[Board, tuple[Snake, Snake]]:
    """Two snakes of full length, begun again from nothing until both fit."""
    while True:
        board = Board.empty(paddles)
        seeds = _two_seeds(board, random)
        if seeds and all(
            board.extend(seeds[turn], seeds[1 - turn], random)
            for _ in range(paddles.settings.contour_length - 1)
            for turn in (0, 1)
        ):
            for snake in seeds:
                board.finish(snake)
            return board, seeds


def grow_distractors(board: Board, random: Random) -> list[Snake]:
    """Short snakes in the room that is left; fewer than asked for where it does not suffice."""
    settings, grown = board.paddles.settings, []
    for _ in range(settings.num_distractors):
        for _ in range(_DISTRACTOR_TRIES):
            trial = Board(board.paddles, board.solid, board.near, board.covered)
            snake = _seed_anywhere(trial, random)
            if snake and all(trial.extend(snake, None, random) for _ in range(settings.distractor_length - 1)):
                trial.finish(snake)
                grown.append(snake)
                board = trial
                break
    return grown


def _two_seeds(board: Board, random: Random) -> tuple[Snake, Snake] | None:
    """The first near the middle, the second's tail at the seed distance from it."""
    settings, first = board.paddles.settings, board.paddles.first
    border = 2 * settings.seed_distance
    y, x = (border + int(random.random() * (settings.side - 2 * border)) for _ in range(2))
    one = board.start(first(int(random.random() * 360)), y, x)
    for _ in range(_TRIES):
        paddle, angle = first(int(random.random() * 360)), math.radians(int(random.random() * 360))
        v = y + round(settings.seed_distance * math.sin(angle))
        u = x + round(settings.seed_distance * math.cos(angle))
        if _fits(board.paddles, paddle, v, u):
            return one, board.start(paddle, v, u)
    return None


def _seed_anywhere(board: Board, random: Random) -> Snake | None:
    """A first paddle in a random direction, at a random one of the pixels where it touches nothing."""
    plane = board.paddles.plane
    paddle = board.paddles.first(int(random.random() * 360))
    taken = 0
    for shift in paddle.solid_shifts:
        taken |= board.covered >> shift
    free = ~taken & ((1 << plane.shift(plane.side - 1, plane.side)) - 1)  # bit y * stride + x: the tail at (y, x)
    if not free:
        return None
    y, x = divmod(_nth_bit(free, int(random.random() * free.bit_count())), plane.stride)
    return board.start(paddle, y, x) if _fits(board.paddles, paddle, y, x) else None


def _fits(paddles: PaddleSet, paddle: Paddle, y: int, x: int) -> bool:
    """Whether a first paddle lies in the picture with the pivot of the next."""
    side = paddles.settings.side
    inside = 0 <= y < side and 0 <= x < side
    return inside and 0 <= y + paddle.next_pivot[0] < side and 0 <= x + paddle.next_pivot[1] < side


def _nth_bit(bits: int, n: int) -> int:
    """The place of the n-th bit that is set, counted from 0 at the low end, by halving."""
    place, width = 0, bits.bit_length()
    while width > 1:
        half = width // 2
        low = bits & ((1 << half) - 1)
        count = low.bit_count()
        if n < count:
            bits, width = low, half
        else:
            n, bits, place, width = n - count, bits >> half, place + half, width - half
    return place
