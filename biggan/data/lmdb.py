"""Encoded images in an LMDB, in the two layouts that are met.

- torchvision's and LSUN's: each key (of any form) has the bytes of an image file.
- That of rosinality's StyleGAN2: keys `{resolution}-{index:05d}`, one set a resolution, and `length`.

Neither holds labels. Sources: https://github.com/fyu/lsun, torchvision.datasets.LSUN, and
https://github.com/rosinality/stylegan2-pytorch, prepare_data.py.
"""

from __future__ import annotations

import re
from pathlib import Path

from PIL import Image

from biggan.data.decode import DamagedImage, check_file_size, open_image
from biggan.data.labels import no_labels
from biggan.data.lmdb_pages import DamagedPages, lmdb_entries, lmdb_values
from biggan.data.records import IndexedSource, file_stamp
from runtime.errors import UserError
from runtime.progress import track

DATA_FILE = "data.mdb"
_LENGTH = b"length"
_SIZED = re.compile(rb"([0-9]{1,5})-([0-9]{5,12})")

Values = list[tuple[bytes, int, int]]  # key, place, size


def lmdb_source(path: Path, resolution: str = "", progress: bool = True) -> IndexedSource:
    """Opens an LMDB, a folder with data.mdb or such a file, and lists its keys; values are read when they are decoded.

    Images are in the order of their keys. Of several resolutions the largest is read, or the one asked for.

    Raises:
        UserError: a damaged or empty database, or no such resolution.
    """
    file = path / DATA_FILE if path.is_dir() else path
    try:
        values = list(track(lmdb_values(file), lmdb_entries(file), f"listing {path}", progress))
    except DamagedPages as error:
        raise UserError(f"{path} is damaged, cut short or no LMDB: {error}") from None
    values = _of_one_resolution(values, resolution, path)
    if not values:
        raise UserError(f"no images in {path}: it has no keys")

    def name(index: int) -> str:
        return repr(values[index][0])[2:-1]

    def read(index: int) -> Image.Image:
        _, place, size = values[index]
        check_file_size(size)
        with file.open("rb") as opened:
            opened.seek(place if place < 1 << 62 else 0)
            data = opened.read(size)
        if len(data) < size:
            raise DamagedImage("the LMDB was cut short")
        return open_image(data)

    stamp = [file_stamp(file), len(values), values[0][0].hex(), values[-1][0].hex()]
    title = f"{path}/{resolution}" if resolution else str(path)
    labels, class_names = no_labels(len(values))
    return IndexedSource(title, labels, class_names, stamp, name, read)


def _of_one_resolution(values: Values, resolution: str, path: Path) -> Values:
    """All values of the first layout; those of one resolution, by number, of the second."""
    numbers: dict[int, list[tuple[int, tuple[bytes, int, int]]]] = {}
    if any(value[0] == _LENGTH for value in values):
        for value in values:
            if match := _SIZED.fullmatch(value[0]):
                numbers.setdefault(int(match[1]), []).append((int(match[2]), value))
    if not numbers:
        if resolution:
            raise UserError(f"{path} has images of one kind only: leave out /{resolution}")
        return [value for value in values if value[0] != _LENGTH]
    if resolution and (not resolution.isdecimal() or int(resolution) not in numbers):
        raise UserError(f"{path} has no {resolution!r}; its resolutions are {', '.join(map(str, sorted(numbers)))}")
    return [value for _, value in sorted(numbers[int(resolution) if resolution else max(numbers)])]
