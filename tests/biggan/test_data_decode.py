"""Every kind of image file becomes the right upright RGB square, and every broken one a DamagedImage."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from biggan.data.decode import DamagedImage, check_file_size, open_image, square_rgb

RED, GREEN, BLUE, WHITE = (230, 20, 20), (20, 200, 20), (20, 20, 220), (255, 255, 255)


def quadrants(size=32):
    """RGB: red, green / blue, white."""
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    half = size // 2
    pixels[:half, :half], pixels[:half, half:], pixels[half:, :half], pixels[half:, half:] = RED, GREEN, BLUE, WHITE
    return Image.fromarray(pixels)


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def decode(data, resolution=32):
    return square_rgb(open_image(data), resolution)


def corners(pixels):
    """The colours at the middle of the four quadrants, (4, 3)."""
    quarter = pixels.shape[-1] // 4
    return np.array([pixels[:, y, x] for y in (quarter, -quarter) for x in (quarter, -quarter)], dtype=int)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_formats(kind):
    pixels = decode(encode(quadrants(), kind))
    assert pixels.shape == (3, 32, 32) and pixels.dtype == np.uint8 and pixels.flags.c_contiguous
    assert np.abs(corners(pixels) - [RED, GREEN, BLUE, WHITE]).max() <= 6


def test_lossless_pixels_of_the_right_size_are_untouched():
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    assert np.array_equal(decode(encode(Image.fromarray(noise), "PNG")), noise.transpose(2, 0, 1))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored_by_orientation = {
        1: [],
        2: [Image.Transpose.FLIP_LEFT_RIGHT],
        3: [Image.Transpose.ROTATE_180],
        4: [Image.Transpose.FLIP_TOP_BOTTOM],
        5: [Image.Transpose.TRANSPOSE],
        6: [Image.Transpose.ROTATE_90],  # stored turned to the left; viewers turn it to the right
        7: [Image.Transpose.TRANSVERSE],
        8: [Image.Transpose.ROTATE_270],
    }
    stored = quadrants()
    for transpose in stored_by_orientation[orientation]:
        stored = stored.transpose(transpose)
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels = decode(encode(stored, "JPEG", exif=exif, quality=95))
    assert np.abs(corners(pixels) - [RED, GREEN, BLUE, WHITE]).max() <= 12


def test_grey_and_bilevel():
    grey = Image.fromarray(np.full((8, 8), 77, dtype=np.uint8))
    assert (decode(encode(grey, "JPEG"), 8) == 77).all()
    assert (decode(encode(grey.convert("1", dither=0), "PNG"), 8) == 0).all()


def test_grey_is_resized_as_rgb_would_be():
    grey = Image.fromarray(np.random.default_rng(1).integers(0, 256, (50, 40), dtype=np.uint8))
    assert np.array_equal(decode(encode(grey, "PNG")), decode(encode(grey.convert("RGB"), "PNG")))


def test_transparency_is_laid_on_white():
    image = quadrants().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 16, 16))
    image.paste((0, 0, 0, 128), (16, 0, 32, 16))
    colours = corners(decode(encode(image, "PNG")))
    assert np.abs(colours - [WHITE, (127, 127, 127), BLUE, WHITE]).max() <= 1
    grey_alpha = Image.merge("LA", [Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 0)])
    assert (decode(encode(grey_alpha, "PNG"), 8) == 255).all()


def test_palettes_with_and_without_transparency():
    palette = quadrants().quantize(8)
    assert palette.mode == "P"
    assert np.abs(corners(decode(encode(palette, "PNG"))) - [RED, GREEN, BLUE, WHITE]).max() <= 6
    see_through = palette.getpixel((0, 0))
    colours = corners(decode(encode(palette, "PNG", transparency=see_through)))
    assert np.abs(colours - [WHITE, GREEN, BLUE, WHITE]).max() <= 6


def test_cmyk_jpeg():
    pixels = decode(encode(quadrants().convert("CMYK"), "JPEG", quality=95))
    assert np.abs(corners(pixels) - [RED, GREEN, BLUE, WHITE]).max() <= 12


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_16_bit_greys_are_scaled_not_clipped(kind):
    values = np.array([[0, 257 * 40], [257 * 128, 65535]], dtype=np.uint16).repeat(4, 0).repeat(4, 1)
    assert corners(decode(encode(Image.fromarray(values), kind), 8))[:, 0].tolist() == [0, 40, 128, 255]


@pytest.mark.parametrize("size", [(64, 32), (32, 64)])
def test_the_central_square_is_kept(size):
    image = Image.new("RGB", size, "black")
    image.paste(quadrants(), ((size[0] - 32) // 2, (size[1] - 32) // 2))
    assert np.array_equal(decode(encode(image, "PNG")), decode(encode(quadrants(), "PNG")))


def test_shrinking_is_antialiased():
    board = np.indices((64, 64)).sum(0) % 2 * 255  # a checkerboard of single pixels: its average is grey
    pixels = decode(encode(Image.fromarray(board.astype(np.uint8)), "PNG"), 16)
    assert np.abs(pixels.astype(int) - 127).max() <= 8


def oversized_png():
    """A valid header that claims 9,000 x 9,000 pixels."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", 9000, 9000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


def cut(data, fraction):
    return data[: int(len(data) * fraction)]


BROKEN = {
    "empty": (b"", "empty file"),
    "text": (b"not an image at all", "known format"),
    "cut jpeg": (cut(encode(quadrants(), "JPEG"), 0.9), "(?i)truncated"),
    "cut png": (cut(encode(quadrants(), "PNG"), 0.7), "."),
    "cut header": (encode(quadrants(), "PNG")[:20], "."),
    "huge": (oversized_png(), "too many"),
    "floats": (encode(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF"), "known range"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n", "known format"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_damaged_images(name):
    data, reason = BROKEN[name]
    with pytest.raises(DamagedImage, match=reason):
        decode(data)


def test_files_too_large_to_be_images_are_not_read():
    check_file_size(1 << 20)
    with pytest.raises(DamagedImage, match="too many for one image"):
        check_file_size(1 << 40)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"])
def test_mutated_files_decode_or_are_damaged(kind):
    rng = np.random.default_rng(5)
    original = np.frombuffer(encode(quadrants(), kind), dtype=np.uint8)
    for _ in range(60):
        data = original.copy()
        data[rng.integers(0, len(data), 5)] = rng.integers(0, 256, 5)
        try:
            assert decode(data.tobytes(), 16).shape == (3, 16, 16)
        except DamagedImage as error:
            assert str(error)
