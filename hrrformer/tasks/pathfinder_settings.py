"""The parameters of the Pathfinder sets of the Long Range Arena.

Source: Tay et al. 2020, arXiv:2011.04006, whose settings of the program of Linsley et al. 2018, arXiv:1805.08315.
"""

from __future__ import annotations

from dataclasses import dataclass

from runtime.errors import UserError


@dataclass(frozen=True)
class Settings:
    """Lengths in pixels; a snake is a dashed line, a paddle one of its dashes.

    Args:
        margins: gaps before and after a paddle; a picture draws one of them.
        padding: frame that stays empty.
        continuity: the larger, the straighter the snakes.
        distractor_paddles: of all distractors together.
        snake_contrast: brightness of distractors, and of the two snakes where multiplied by `paddle_contrast`.
        contour_length: paddles of each of the two snakes.
    """

    side: int
    margins: tuple[int, ...]
    padding: int
    paddle_length: int
    thickness: float
    marker_radius: float
    seed_distance: int
    continuity: float
    distractor_paddles: int
    snake_contrast: float
    paddle_contrast: float
    contour_length: int

    @property
    def distractor_length(self) -> int:
        return self.contour_length // 3

    @property
    def num_distractors(self) -> int:
        return self.distractor_paddles // self.distractor_length


_BY_SIDE = {
    32: ((1,), 1, 2, 0.5, 1.5, 7, 1.0, 20, 2.0, 0.75),
    64: ((1,), 1, 5, 1.0, 2.5, 12, 1.8, 22, 0.8, 1.0),
    128: ((2, 3), 1, 5, 1.5, 3.0, 20, 1.8, 35, 0.9, 1.0),
    256: ((3,), 22, 5, 2.0, 5.0, 27, 1.8, 30, 1.0, 1.0),
}
SETS = {6: "curv_baseline", 9: "curv_contour_length_9", 14: "curv_contour_length_14"}
"""The folder of each contour length; the last is the one of the benchmark."""


def get_settings(side: int, contour_length: int) -> Settings:
    """Raises UserError for a resolution or contour length without published parameters."""
    if side not in _BY_SIDE:
        raise UserError(f"Pathfinder has the resolutions {', '.join(map(str, _BY_SIDE))}, not {side}")
    if contour_length not in SETS:
        raise UserError(f"Pathfinder has the contour lengths {', '.join(map(str, SETS))}, not {contour_length}")
    return Settings(side, *_BY_SIDE[side], contour_length)
