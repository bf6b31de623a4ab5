"""Pathfinder: drawn pictures obey the published procedure; the official layout and its errors."""

from random import Random

import numpy as np
import pytest
from PIL import Image

from hrrformer.data import open_task
from hrrformer.tasks import pathfinder_pictures
from hrrformer.tasks.pathfinder_paddles import paddle_set
from hrrformer.tasks.pathfinder_pictures import draw_picture
from hrrformer.tasks.pathfinder_settings import get_settings
from hrrformer.tasks.pathfinder_snakes import _nth_bit, grow_distractors, grow_pair
from runtime.errors import UserError

HARD = get_settings(32, 14)


def as_array(plane, bits):
    """A plane as bool (side, side)."""
    size = plane.stride
    octets = np.frombuffer(bits.to_bytes(-(-size * size // 8), "little"), dtype=np.uint8)
    whole = np.unpackbits(octets, bitorder="little")[: size * size].reshape(size, size).astype(bool)
    return whole[plane.reach : -plane.reach, plane.reach : -plane.reach]


@pytest.fixture(scope="module", params=[(32, 14), (32, 6), (128, 9)], ids=lambda p: f"{p[0]}-{p[1]}")
def drawn(request):
    """Settings, paddles and eight pictures as (board, pair, distractors)."""
    settings = get_settings(*request.param)
    paddles = paddle_set(settings, settings.margins[-1])
    pictures = []
    for seed in range(8):
        random = Random(seed)
        board, pair = grow_pair(paddles, random)
        pictures.append((board, pair, grow_distractors(board, random)))
    return settings, paddles, pictures


def test_two_long_snakes_and_short_distractors(drawn):
    settings, _, pictures = drawn
    for _, pair, distractors in pictures:
        assert [len(snake.paddles) for snake in pair] == [settings.contour_length] * 2
        assert {len(snake.paddles) for snake in distractors} == {settings.contour_length // 3}
        assert len(distractors) <= settings.num_distractors
    assert np.mean([len(distractors) for _, _, distractors in pictures]) > 0.6 * settings.num_distractors


def test_paddles_overlap_nothing_but_their_neighbours(drawn):
    _, paddles, pictures = drawn
    for _, pair, distractors in pictures:
        frame = as_array(paddles.plane, paddles.frame)
        placed = []
        for number, snake in enumerate([*pair, *distractors]):
            for place, (paddle, y, x) in enumerate(snake.paddles):
                shape = as_array(paddles.plane, paddle.solid << paddles.plane.shift(y, x))
                assert shape.any() and not (shape & frame).any()
                for other, (snake_number, other_place) in placed:
                    if (snake_number, other_place) != (number, place - 1):
                        assert not (shape & other).any()
                placed.append((shape, (number, place)))


def test_the_second_snake_begins_at_the_seed_distance_and_the_first_in_the_middle(drawn):
    settings, _, pictures = drawn
    for _, pair, _ in pictures:
        (y, x), (v, u) = (np.array(snake.ends[0]) for snake in pair)
        assert abs(np.hypot(y - v, x - u) - settings.seed_distance) <= 0.75
        assert 2 * settings.seed_distance <= min(y, x) and max(y, x) < settings.side - 2 * settings.seed_distance


def test_steps_and_turns_are_those_of_the_settings(drawn):
    settings, paddles, pictures = drawn
    for paddle in paddles.further:
        assert abs(np.hypot(*paddle.tip) - settings.paddle_length - paddles.margin) <= 0.75
        assert abs(np.hypot(*paddle.next_pivot) - settings.paddle_length - 2 * paddles.margin) <= 0.75
    turns = []
    for _, pair, distractors in pictures:
        for snake in [*pair, *distractors]:
            angles = [np.arctan2(*paddle.tip) for paddle, _, _ in snake.paddles[1:]]
            turns += np.abs((np.diff(angles) + np.pi) % (2 * np.pi) - np.pi).tolist()
    assert max(turns) < np.pi / 2 / settings.continuity + 1e-9
    assert max(turns) > 0.6 * np.pi / 2 / settings.continuity


def test_followers_are_drawn_in_proportion_to_the_squared_cosine():
    paddles = paddle_set(HARD, 1)
    straight = next(paddle for paddle in paddles.further if paddle.tip == (0, 3))
    weights = {paddles.further[number].tip: weight for number, _, weight in straight.followers}
    assert weights[0, 3] == 1 and weights[2, 2] == pytest.approx(0.5)
    assert (-3, 0) not in weights and (0, -3) not in weights  # at right angles and back


def test_markers_lie_on_one_snake_or_on_two(monkeypatch):
    marked, pairs = [], []
    lay, grow = pathfinder_pictures._lay, pathfinder_pictures.grow_pair
    monkeypatch.setattr(pathfinder_pictures, "_lay", lambda c, s, y, x: (marked.append((y, x)), lay(c, s, y, x)))
    monkeypatch.setattr(pathfinder_pictures, "grow_pair", lambda *a: pairs.append(grow(*a)) or pairs[-1])
    for index in range(30):
        _, label, _ = draw_picture(HARD, 0, index)
        (first, second), (_, (one, other)) = marked[-2:], pairs[-1]
        owners = [[snake is one for snake in (one, other) if snake.ends[k] == (first, second)[k]] for k in (0, 1)]
        assert (owners[0] == owners[1]) == bool(label)


def test_labels_are_balanced_and_pictures_stretched():
    drawings = [draw_picture(HARD, 0, index) for index in range(300)]
    labels = np.array([label for _, label, _ in drawings])
    assert abs(labels.mean() - 0.5) < 0.1
    pictures = np.stack([picture for picture, _, _ in drawings])
    assert pictures.dtype == np.uint8 and pictures.shape == (300, 32, 32)
    assert (pictures.reshape(300, -1).min(1) == 0).all() and (pictures.reshape(300, -1).max(1) == 255).all()
    brightness = pictures.reshape(300, -1).mean(1)
    assert abs(brightness[labels == 1].mean() - brightness[labels == 0].mean()) < 4 * brightness.std() / 300**0.5 * 2
    assert len({picture.tobytes() for picture in pictures}) == 300


def test_a_picture_is_a_function_of_settings_seed_and_number():
    one, again = (draw_picture(HARD, 3, 17)[0] for _ in range(2))
    assert np.array_equal(one, again)
    assert not np.array_equal(draw_picture(HARD, 4, 17)[0], one)
    assert not np.array_equal(draw_picture(HARD, 3, 18)[0], one)


@pytest.mark.parametrize("side", [64, 256])
def test_the_other_resolutions(side):
    picture, label, margin = draw_picture(get_settings(side, 9), 0, 0)
    assert picture.shape == (side, side) and label in (0, 1) and margin in get_settings(side, 9).margins


def test_counts_of_distractors_are_those_of_the_published_sets():
    assert [get_settings(side, 14).num_distractors for side in (32, 64, 128, 256)] == [5, 5, 8, 7]
    for wrong in ((48, 14), (32, 7)):
        with pytest.raises(UserError, match="Pathfinder has the (resolutions 32, 64|contour lengths 6, 9)"):
            get_settings(*wrong)


def test_the_nth_bit():
    bits = 0b1011000010000000001
    assert [_nth_bit(bits, n) for n in range(5)] == [0, 10, 15, 16, 18]


# Files


@pytest.fixture
def folder(tmp_path):
    """Two folders of fifteen 8 x 8 pictures."""
    place = tmp_path / "pathfinder8" / "curv_contour_length_14"
    (place / "metadata").mkdir(parents=True)
    for number in (0, 1):
        (place / "imgs" / str(number)).mkdir(parents=True)
        rows = []
        for index in range(15):
            pixels = np.full((8, 8), 100 * number + index, dtype=np.uint8)
            Image.fromarray(pixels).save(place / "imgs" / str(number) / f"sample_{index}.png")
            rows.append(f"imgs/{number} sample_{index}.png {index} {index % 2} 1.0 14 4 2 0.5 1 1\n")
        (place / "metadata" / f"{number}.npy").write_text("".join(rows))
    return place


def read(path, tmp_path, max_length=64):
    return open_task("pathfinder", str(path), max_length, tmp_path / "cache", workers=1, progress=False)


@pytest.mark.parametrize("above", [0, 1, 2])
def test_the_hard_set_is_found_and_parted(folder, tmp_path, above):
    data = read([folder, *folder.parents][above], tmp_path)
    assert [len(split) for split in (data.train, data.validation, data.test)] == [24, 3, 3]
    values = {}
    for split in (data.train, data.validation, data.test):
        rows = split.rows(np.arange(len(split)), 64)
        assert (rows == rows[:, :1]).all()
        values |= dict(zip(rows[:, 0].tolist(), split.labels.tolist(), strict=True))
    assert values == {100 * number + index: index % 2 for number in (0, 1) for index in range(15)}


def test_empty_pictures_are_left_out(folder, tmp_path):
    (folder / "imgs" / "0" / "sample_3.png").write_bytes(b"")
    with pytest.warns(UserWarning, match="left out 1 empty files of 30"):
        data = read(folder, tmp_path)
    rows = [split.rows(np.arange(len(split)), 1)[:, 0].tolist() for split in (data.train, data.validation, data.test)]
    assert 3 not in sum(rows, []) and len(sum(rows, [])) == 29


def test_bad_rows_pictures_and_folders(folder, tmp_path):
    with pytest.raises(UserError, match="sample_0.png is 8 x 8, and max_length 1024 means 32 x 32 pixels"):
        read(folder, tmp_path, 1024)
    (folder / "imgs" / "1" / "sample_2.png").unlink()
    with pytest.raises(UserError, match="cannot read .*imgs/1/sample_2.png: No such file"):
        read(folder, tmp_path)
    (folder / "imgs" / "1" / "sample_2.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="sample_2.png is not a sound image"):
        read(folder, tmp_path)
    table = folder / "metadata" / "1.npy"
    table.write_text(table.read_text() + "imgs/1 sample_15.png 15 joined\n")
    with pytest.raises(UserError, match="1.npy, line 16: expected text with folder, file, index and label 0 or 1"):
        read(folder, tmp_path)
    for file in (folder / "metadata").iterdir():
        file.unlink()
    with pytest.raises(UserError, match="metadata holds no .npy files"):
        read(folder, tmp_path)
    with pytest.raises(UserError, match="found no metadata in .* nor in its folders curv_contour_length_14"):
        read(folder / "imgs", tmp_path)
