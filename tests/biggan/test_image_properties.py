"""Images that hypothesis draws come back as they are; files with any bytes changed are images or named as damaged."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from image_variants import encode, image_files
from PIL import Image

from biggan.data.decode import DamagedImage, open_image, square_rgb
from hrrformer.tasks.pixels import decode

NUMBERS = [40, pytest.param(2000, marks=pytest.mark.slow)]
LOSSLESS = {"PNG": {}, "BMP": {}, "PPM": {}, "TIFF": {"compression": "tiff_lzw"}, "WEBP": {"lossless": True}}
FILES = image_files()

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")


def cases(number):
    return settings(max_examples=number, deadline=None, derandomize=True)


@pytest.mark.parametrize("number", NUMBERS)
def test_lossless_images_come_back_as_their_middle(number):
    sides = st.integers(1, 12)

    @given(
        st.tuples(sides, sides).flatmap(lambda size: arrays.arrays(np.uint8, (*size, 3))),
        st.sampled_from(sorted(LOSSLESS)),
    )
    @cases(number)
    def check(pixels, kind):
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        data = encode(Image.fromarray(pixels), kind, **LOSSLESS[kind])
        expected = pixels[top : top + side, left : left + side].transpose(2, 0, 1)
        assert np.array_equal(square_rgb(open_image(data), side), expected)

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_files_with_any_bytes_changed(number):
    @given(
        name=st.sampled_from(sorted(FILES)),
        changes=st.lists(st.tuples(st.integers(0, 4000), st.integers(0, 255)), max_size=8),
        cut=st.none() | st.integers(0, 4000),
        rest=st.binary(max_size=40),
    )
    @cases(number)
    def check(name, changes, cut, rest):
        data = bytearray(FILES[name])
        for place, value in changes:
            data[place % len(data)] = value
        data = bytes(data if cut is None else data[: cut % len(data)] + rest)
        for read, refusal in (
            (lambda: square_rgb(open_image(data), 8), DamagedImage),
            (lambda: decode(data), ValueError),
        ):
            try:
                found = read()
            except refusal as error:
                assert str(error)
            else:
                assert isinstance(found, Image.Image) or (found.shape, found.dtype) == ((3, 8, 8), np.uint8)

    check()


@pytest.mark.parametrize("number", NUMBERS)
def test_any_bytes_at_all(number):
    """The first bytes of each format, and then anything."""
    starts = sorted({data[:size] for data in FILES.values() for size in (0, 4, 16, 40)})

    @given(st.sampled_from(starts), st.binary(max_size=200))
    @cases(number)
    def check(start, rest):
        try:
            assert square_rgb(open_image(start + rest), 8).shape == (3, 8, 8)
        except DamagedImage as error:
            assert str(error)

    check()
