"""From the bytes of an image file to square RGB pixels, with every damaged file as one exception."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image, ImageOps

RESIZE_RULE = "center-crop-lanczos"  # part of every fingerprint: other rules give other statistics

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")  # Pillow's others include some that run programs
_MAX_PIXELS = 1 << 26  # a 300-byte file can claim any size; 8192 x 8192 is more than any photograph here needs
_MAX_BYTES = 1 << 29


class DamagedImage(Exception):
    """A file that cannot be decoded; the text says why."""


def check_file_size(num_bytes: int) -> None:
    """To be asked before a file is read or decompressed.

    Raises:
        DamagedImage: more bytes than any image has.
    """
    if num_bytes > _MAX_BYTES:
        raise DamagedImage(f"{num_bytes:,} bytes are too many for one image")


def open_image(data: bytes) -> Image.Image:
    """Reads the header of a JPEG, PNG, WebP, BMP, PPM, TIFF or GIF (its first frame); pixels are decoded later.

    Raises:
        DamagedImage: another format, a broken header, or absurd dimensions (refused before anything is decoded).
    """
    try:
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    except Image.UnidentifiedImageError:
        raise DamagedImage("not an image of a known format" if data else "empty file") from None
    except Exception as error:  # Pillow's plugins raise anything from struct.error to SyntaxError on broken headers
        raise DamagedImage(str(error) or type(error).__name__) from None
    if image.width * image.height > _MAX_PIXELS:
        raise DamagedImage(f"{image.width} x {image.height} pixels are too many for one image")
    return image


def square_rgb(image: Image.Image, resolution: int) -> np.ndarray:
    """Upright, RGB, cropped to its central square and resized with an antialiased Lanczos filter.

    The EXIF orientation is applied; transparency is laid on white, as browsers show it; 16-bit greys keep their upper
    eight bits; other modes (grey, palette, CMYK, ...) are converted by Pillow. An image of the right size stays as is.

    Returns:
        uint8 (3, R, R), contiguous.

    Raises:
        DamagedImage: pixels that cannot be decoded (a truncated file, for one), or floating-point pixels.
    """
    try:
        image = _grey_or_rgb(ImageOps.exif_transpose(image))
        side = min(image.size)
        if image.width != image.height:
            left, top = (image.width - side) // 2, (image.height - side) // 2
            image = image.crop((left, top, left + side, top + side))
        if side != resolution:
            image = image.resize((resolution, resolution), Image.Resampling.LANCZOS)
        return np.ascontiguousarray(np.asarray(image.convert("RGB")).transpose(2, 0, 1))  # (R, R, 3) -> (3, R, R)
    except DamagedImage:
        raise
    except Exception as error:  # as above: the decoders raise whatever they stumble over
        raise DamagedImage(str(error) or type(error).__name__) from None


def _grey_or_rgb(image: Image.Image) -> Image.Image:
    """Mode L or RGB; greys stay one channel until they are resized, at a third of the work."""
    if image.mode == "F":
        raise DamagedImage("floating-point pixels have no known range")
    if image.mode.startswith("I"):  # 16 bits; Pillow's own conversion clips at 255 instead of scaling
        values = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(values.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "L" else image.convert("RGB")
