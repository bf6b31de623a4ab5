"""Finding the files of a task, and saying clearly what is missing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from runtime.errors import UserError

MAX_LINE_BYTES = 1 << 26


def locate(path: Path, wanted: Sequence[str], nested: Sequence[str], where: str) -> Path:
    """The folder that holds all files or folders `wanted`: the path itself, or one of the `nested` ones below it.

    Raises:
        UserError: none does; `where` says which files are read and where to get them.
    """
    for folder in [path, *(path / name for name in nested)]:
        missing = [name for name in wanted if not (folder / name).is_file() and not (folder / name).is_dir()]
        if not missing:
            return folder
        if len(missing) < len(wanted):
            raise UserError(f"{folder} has no {', '.join(missing)}. Needed: {where}")
    below = f", nor in its folders {', '.join(nested)}" if nested else ""
    raise UserError(f"found no {wanted[0]} in {path}{below}. Needed: {where}")


def class_files(
    folder: Path,
    splits: Sequence[str],
    class_names: Sequence[str],
    files_in: Callable[[Path], list[Path]],
    kind: str,
    where: str,
) -> dict[str, list[tuple[Path, int]]]:
    """{split: [(file, label), ...]} of `folder/split/class`, in the order of `files_in(folder)`.

    Raises:
        UserError: a folder is missing, or one has no files; `kind` says of what, and `where` what is needed.
    """
    files: dict[str, list[tuple[Path, int]]] = {split: [] for split in splits}
    for split in splits:
        for label, name in enumerate(class_names):
            place = folder / split / name
            if not place.is_dir():
                raise UserError(f"{place} is missing. Needed: {where}")
            found = files_in(place)
            if not found:
                raise UserError(f"{place} holds no {kind}: the class {name} is empty")
            files[split] += [(file, label) for file in found]
    return files


def stamp(paths: Iterable[Path]) -> str:
    """Names, sizes and times of change of some files or folders: other text where the files may be others."""
    parts = []
    for path in paths:
        status = path.stat()
        parts.append(f"{path.name} {status.st_size} {status.st_mtime_ns}")
    return "\n".join(parts)


def walk(folder: Path) -> list[Path]:
    """All files below a folder that are not hidden, in natural order. To open a pipe or a device could wait for ever.

    Raises:
        UserError: the folder, or one below it, cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")

    found = []
    for parent, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(parent, name) for name in natural(name for name in files if not name.startswith(".")))
        found += [path for path in paths if path.is_file()]
    return found


def natural(names: Iterable[str]) -> list[str]:
    """Names sorted so that 2.txt comes before 10.txt."""
    return sorted(names, key=lambda name: (len(name), name))


def lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of a file with their numbers from 1, without their ends; a last empty line is left out.

    Raises:
        UserError: a line is longer than any example.
    """
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(MAX_LINE_BYTES), b""), 1):
            if len(line) == MAX_LINE_BYTES:
                raise UserError(f"{path}, line {number}: longer than {MAX_LINE_BYTES >> 20} MiB")
            yield number, line.rstrip(b"\r\n")


def count_lines(path: Path) -> int:
    """The number of line ends, read in large pieces."""
    with path.open("rb") as file:
        return sum(piece.count(b"\n") for piece in iter(lambda: file.read(1 << 22), b""))
