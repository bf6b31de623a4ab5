"""Pictures of attention weights: where panels are, what their colours say, and what is refused."""

import numpy as np
import pytest
import torch

from hrrformer.heatmaps import ANCHORS, GAP, LINE, draw_heatmaps

SIDE, HEADS = 8, 3
PANEL = 192  # 8 pixels, 24 wide each


def test_panels():
    tokens = torch.arange(SIDE**2)[None].repeat(2, 1) * 4
    weights = torch.full((2, HEADS, SIDE**2), 1.0)
    weights[0, 1, 10] = 5.0  # row 1, column 2
    weights = weights / weights.sum(-1, keepdim=True)
    sheet = np.asarray(draw_heatmaps(tokens, weights, ["first", "second"]))
    top = GAP + 2 * LINE

    def pixel(column, y, x, row=0):
        """The colour of pixel (y, x) of a panel, at its middle."""
        offset = row * (2 * LINE + PANEL + GAP)
        return sheet[offset + top + 24 * y + 12, GAP + column * (PANEL + GAP) + 24 * x + 12]

    for y, x in ((0, 0), (3, 5), (7, 7)):
        assert (pixel(0, y, x) == 4 * (8 * y + x)).all()
        assert (pixel(1, y, x) == ANCHORS[0]).all()  # equal weights
        assert (pixel(2, y, x) == ANCHORS[0]).all()
    assert (pixel(2, 1, 2) == ANCHORS[-1]).all()
    assert (pixel(2, 1, 2, row=1) == ANCHORS[0]).all()
    assert sheet.shape[1] == GAP + (1 + HEADS) * (PANEL + GAP)
    text = sheet[GAP : GAP + LINE, GAP:200]
    assert (text < 128).any() and (text == 255).any()


def test_refuses_what_is_no_picture():
    tokens, weights = torch.zeros(1, 10, dtype=torch.long), torch.full((1, 2, 10), 0.1)
    with pytest.raises(ValueError, match="square"):
        draw_heatmaps(tokens, weights, ["a"])
    with pytest.raises(ValueError, match="captions"):
        draw_heatmaps(torch.zeros(1, 9, dtype=torch.long), torch.full((1, 2, 9), 1 / 9), [])
