"""Pathfinder: whether a dashed line joins two marked points of a drawing, read pixel by pixel; Path-X at 128 x 128.

Source: Linsley et al. 2018, arXiv:1805.08315; as a sequence task, Tay et al. 2020, arXiv:2011.04006.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from hrrformer.tasks.files import lines, locate, natural, stamp
from hrrformer.tasks.parallel import ordered_map
from hrrformer.tasks.pathfinder_settings import SETS
from hrrformer.tasks.pixels import decode, read_file, side_of
from hrrformer.tasks.protocol import Example, Source, Task
from runtime.errors import UserError

CLASS_NAMES = ("apart", "joined")
HARD = SETS[14]
WHERE = (
    "a folder with metadata/*.npy and imgs/, such as lra_release/pathfinder32/curv_contour_length_14, or one above it "
    "(python -m tools.prepare_lra pathfinder FOLDER makes it; or the release of the Long Range Arena, "
    "github.com/google-research/long-range-arena)"
)


def _open(path: Path, max_length: int) -> Source:
    """The set named by the path, or below it the one of the benchmark, which is the hard one."""
    side = side_of(max_length)
    nested = [HARD, f"pathfinder{side}/{HARD}", f"lra_release/pathfinder{side}/{HARD}"]
    folder = locate(path, ("metadata",), nested, WHERE)
    tables = [folder / "metadata" / name for name in natural(file.name for file in (folder / "metadata").glob("*.npy"))]
    if not tables:
        raise UserError(f"{folder / 'metadata'} holds no .npy files. Needed: {WHERE}")
    images = [image for table in tables for image in _read_table(folder, table)]

    def read(split: str, workers: int) -> Iterator[Example]:
        files = (file for file, _ in images)
        empty = 0
        for pixels, (_, label) in zip(ordered_map(partial(read_pixels, side), files, workers), images, strict=True):
            empty += not pixels
            if pixels:
                yield (pixels,), label
        if empty:  # pathfinder32/curv_baseline/imgs/0/sample_172.png of the release is one
            warnings.warn(f"left out {empty:,} empty files of {len(images):,} in {folder}", stacklevel=2)

    return Source(
        title=str(folder),
        stamp=stamp([*tables, *_folders(image for image, _ in images)]),
        class_names=CLASS_NAMES,
        sizes={"train": len(images)},
        read=read,
    )


def _read_table(folder: Path, table: Path) -> Iterator[tuple[Path, int]]:
    """Plain text in spite of its name; a row is folder, file, index, label and the parameters of the drawing."""
    for number, row in lines(table):
        columns = row.decode("utf-8", "replace").split()
        if len(columns) < 4 or columns[3] not in ("0", "1"):
            raise UserError(
                f"{table}, line {number}: expected text with folder, file, index and label 0 or 1, "
                f"found {' '.join(columns)[:60]!r}"
            )
        file = Path(columns[0], columns[1])
        if file.is_absolute() or ".." in file.parts or "\0" in str(file):
            raise UserError(f"{table}, line {number}: {str(file)!r} leads out of the folder")
        yield folder / file, int(columns[3])


def _folders(images: Iterable[Path]) -> list[Path]:
    """Those that images lie in."""
    folders = sorted({image.parent for image in images})
    for folder in folders:
        if not os.path.isdir(folder):  # False also for names that no file can have
            raise UserError(f"{folder} is missing, which a table in {folder.parent.parent / 'metadata'} names")
    return folders


def read_pixels(side: int, file: Path) -> bytes:
    """The grey pixels of an image, row by row; nothing where the file is empty.

    Raises:
        UserError: unreadable, damaged, or of another size.
    """
    try:
        data = read_file(file)
        image = decode(data) if data else None
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None
    except ValueError as error:
        raise UserError(f"{file} is not a sound image: {error}") from None
    if image is None:
        return b""
    if image.size != (side, side):
        raise UserError(
            f"{file} is {image.width} x {image.height}, and max_length {side * side} means {side} x {side} pixels"
        )
    return image.convert("L").tobytes()


PATHFINDER = Task(
    name="pathfinder",
    title="a dashed line between two points, pixel by pixel",
    vocab_size=256,
    first_id=0,
    max_length=32 * 32,
    class_names=CLASS_NAMES,
    uses_mask=False,
    where=WHERE,
    open=_open,
)
PATHX = replace(PATHFINDER, name="pathx", max_length=128 * 128)
