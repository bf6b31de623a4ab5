"""What the names of a set of files mean: which are images, in which order, of which class."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Iterable

from runtime.errors import UserError

EXTENSIONS = ("bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp")

_SPLITS = {"train", "val", "valid", "validation", "test"}
_CELEBA_HQ = "CelebA-HQ-img"  # its folder of images; CelebAMask-HQ has masks, which are images too, beside it


def images_among(names: Iterable[str], where: str) -> list[str]:
    """The image files among relative paths with forward slashes, in natural order (2.jpg before 10.jpg).

    Hidden files and `__MACOSX` are ignored. Where there is a folder CelebA-HQ-img, only that is taken.

    Args:
        where: the folder or archive, for the message.

    Raises:
        UserError: there is none.
    """
    visible = [name for name in names if not any(_is_hidden(part) for part in name.split("/"))]
    images = [name for name in visible if _extension(name) in EXTENSIONS]
    if not images:
        kinds = Counter(f".{_extension(name)}" if _extension(name) else "without extension" for name in visible)
        found = ", ".join(f"{count:,} {kind}" for kind, count in kinds.most_common(5)) or "no files at all"
        raise UserError(f"no images in {where}: looked for .{' .'.join(EXTENSIONS)}; found {found}")
    celeba = [name for name in images if _CELEBA_HQ in name.split("/")]
    return sorted(celeba or images, key=_natural)


def class_folders(names: list[str], where: str) -> tuple[list[int], list[str]]:
    """Labels by the first folder below the one that holds everything.

    Two or more such folders are classes, in natural order. Images without such a folder (or a single one: CelebA-HQ,
    an archive of one folder) are one class, called "all"; and so are those in folders of a thousand, as FFHQ has them
    (12000/12345.png).

    Args:
        names: images as from `images_among`.
        where: the folder or archive, for messages.

    Returns:
        a label for each name, and the class names.

    Raises:
        UserError: the folders are the splits of a data set (train, test, ...), which nobody wants as classes.
    """
    paths = [name.split("/") for name in names]
    depth = 0
    while all(len(path) > depth + 1 for path in paths) and len({path[depth] for path in paths}) == 1:
        depth += 1
    folders = sorted({path[depth] for path in paths if len(path) > depth + 1}, key=_natural)
    if len(folders) < 2 or all(_is_numbered(path[depth:]) for path in paths):
        return [0] * len(names), ["all"]
    inside = "/".join([where.rstrip("/"), *paths[0][:depth]])
    if {folder.lower() for folder in folders} <= _SPLITS:
        example = next((folder for folder in folders if folder.lower() == "train"), folders[0])
        raise UserError(f"{inside} holds the splits {', '.join(folders)}: choose one, as in {inside}/{example}")
    loose = sum(len(path) == depth + 1 for path in paths)
    if loose:
        message = f"{loose:,} images lie beside the {len(folders)} folders in {inside}: all is read as one class"
        warnings.warn(message, stacklevel=2)
        return [0] * len(names), ["all"]
    label = {folder: index for index, folder in enumerate(folders)}
    return [label[path[depth]] for path in paths], folders


def _is_numbered(path: list[str]) -> bool:
    """Whether a folder only says which thousand the number of its image lies in."""
    folder, number = path[0], path[-1].partition(".")[0]
    return len(path) == 2 and folder.isascii() and folder.isdigit() and folder == f"{number[:-3]}000"


def _is_hidden(part: str) -> bool:
    return part.startswith(".") or part == "__MACOSX"


def _extension(name: str) -> str:
    stem, dot, extension = name.rpartition("/")[2].rpartition(".")
    return extension.lower() if dot else ""


def _natural(name: str) -> tuple:
    """Sort key that compares runs of digits as numbers (by length, then text: int() refuses very long ones)."""
    parts: list = re.split(r"([0-9]+)", name)  # text, digits, text, ..., text
    parts[1::2] = [(len(digits.lstrip("0")), digits.lstrip("0")) for digits in parts[1::2]]
    return *parts, name
