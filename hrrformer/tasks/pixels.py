"""From the bytes of an image file to grey pixels."""

from __future__ import annotations

import io
import math
import stat
from pathlib import Path

import numpy as np
from PIL import Image

from runtime.errors import UserError

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # Pillow's others include some that run programs
_MAX_PIXELS = 1 << 24
_MAX_BYTES = 1 << 26


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ValueError: too many of them, or a pipe or device, which could be read for ever.
        OSError: it cannot be read.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("no regular file")
    check_file_size(status.st_size)
    return path.read_bytes()


def check_file_size(num_bytes: int) -> None:
    """To be asked before a file is read or decompressed.

    Raises:
        ValueError: more bytes than any image has.
    """
    if num_bytes > _MAX_BYTES:
        raise ValueError(f"{num_bytes:,} bytes are too many for one image")


def decode(data: bytes) -> Image.Image:
    """Raises ValueError for anything that is not a sound image of moderate size."""
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
        if image.width * image.height > _MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels are too many")
        image.load()
    except ValueError:
        raise
    except Exception as error:  # Pillow's decoders raise anything from struct.error to SyntaxError on broken files
        raise ValueError(str(error) or type(error).__name__) from None
    return image


def grey(rgb: np.ndarray) -> np.ndarray:
    """uint8 (..., 3) -> uint8 (...): floor(255.5 (0.2989 R + 0.5870 G + 0.1140 B) / 255), in integers."""
    red, green, blue = np.moveaxis(rgb.astype(np.uint32), -1, 0)
    return (511 * (2989 * red + 5870 * green + 1140 * blue) // 5_100_000).astype(np.uint8)


def side_of(num_pixels: int) -> int:
    """The side of a square picture.

    Raises:
        UserError: no square has so many pixels.
    """
    side = math.isqrt(num_pixels)
    if side * side != num_pixels or side == 0:
        raise UserError(f"max_length is the number of pixels of a square picture (1024, 4096, ...), not {num_pixels}")
    return side
