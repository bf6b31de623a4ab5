"""Small pictures in every file format that is read, in the variants that take other ways through the decoders."""

import io
import zlib

import numpy as np
from PIL import Image

SIZE = 24


def encode(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture():
    """RGB, smooth with a little noise."""
    ramp = np.linspace(0, 200, SIZE)
    noise = np.random.default_rng(0).integers(0, 50, (SIZE, SIZE, 3))
    return Image.fromarray((ramp[:, None, None] / 2 + ramp[None, :, None] / 2 + noise).astype(np.uint8))


def image_files():
    """{name with the suffix of its format: bytes}."""
    rgb = picture()
    grey, palette, clear = rgb.convert("L"), rgb.quantize(16), rgb.convert("RGBA")
    deep = Image.fromarray(np.asarray(grey, dtype=np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6
    film = {"save_all": True, "append_images": [rgb.rotate(90)], "duration": 50}
    return {
        "rgb.jpg": encode(rgb, "JPEG"),
        "progressive.jpg": encode(rgb, "JPEG", progressive=True, exif=turned),
        "cmyk.jpg": encode(rgb.convert("CMYK"), "JPEG"),
        "grey.jpg": encode(grey, "JPEG"),
        "rgb.png": encode(rgb, "PNG"),
        "rgba.png": encode(clear, "PNG"),
        "palette.png": encode(palette, "PNG", transparency=3),
        "deep.png": encode(deep, "PNG"),
        "bits.png": encode(rgb.convert("1"), "PNG"),
        "lossy.webp": encode(rgb, "WEBP"),
        "lossless.webp": encode(clear, "WEBP", lossless=True),
        "film.webp": encode(rgb, "WEBP", **film),
        "rgb.bmp": encode(rgb, "BMP"),
        "palette.bmp": encode(palette, "BMP"),
        "rgb.ppm": encode(rgb, "PPM"),
        "grey.ppm": encode(grey, "PPM"),
        "raw.tiff": encode(rgb, "TIFF"),
        "lzw.tiff": encode(rgb, "TIFF", compression="tiff_lzw"),
        "deflate.tiff": encode(clear, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tiff": encode(rgb, "TIFF", compression="jpeg"),
        "fax.tiff": encode(rgb.convert("1"), "TIFF", compression="group4"),
        "still.gif": encode(palette, "GIF"),
        "film.gif": encode(rgb, "GIF", **film),
    }


def claiming(side):
    """{name: a file of a few hundred bytes whose header claims side x side pixels}."""
    little2, little4, big2, big4 = (side.to_bytes(width, order) for order in ("little", "big") for width in (2, 4))
    small = Image.new("RGB", (8, 8))
    png = encode(small, "PNG")
    header = b"IHDR" + big4 + big4 + png[24:29]
    jpeg = bytearray(encode(small, "JPEG"))
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg[frame : frame + 4] = big2 + big2
    bmp = encode(small, "BMP")
    tiff = encode(small, "TIFF")
    for tag in (256, 257):
        place = _entry(tiff, tag)
        tiff = tiff[: place + 2] + b"\x04\x00" + (1).to_bytes(4, "little") + little4 + tiff[place + 12 :]
    gif = encode(small.quantize(2), "GIF")
    descriptor = gif.index(b",") + 5
    canvas = (side - 1).to_bytes(3, "little")
    webp = encode(small, "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8), "white")])
    return {
        "a.png": png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:],
        "a.jpg": bytes(jpeg),
        "a.bmp": bmp[:18] + little4 + little4 + bmp[26:],
        "a.ppm": b"P6\n%d %d\n255\n" % (side, side) + bytes(100),
        "a.tiff": tiff,
        "screen.gif": gif[:6] + little2 + little2 + gif[10:],
        "frame.gif": gif[:descriptor] + little2 + little2 + gif[descriptor + 4 :],
        "film.webp": webp[:24] + canvas + canvas + webp[30:],
    }


def _entry(tiff, tag):
    """Where a little-endian TIFF's only directory has a tag."""
    start = int.from_bytes(tiff[4:8], "little")
    count = int.from_bytes(tiff[start : start + 2], "little")
    places = [start + 2 + 12 * i for i in range(count)]
    return next(place for place in places if int.from_bytes(tiff[place : place + 2], "little") == tag)
