"""Image files in a folder or in a zip, as a source."""

from __future__ import annotations

import hashlib
import json
import os
import stat
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from PIL import Image

from biggan.data.decode import DamagedImage, check_file_size, open_image
from biggan.data.listing import class_folders, images_among
from biggan.data.records import Record
from biggan.data.stylegan import LABELS_FILE, stylegan_labels
from runtime.errors import UserError, of_the_system


class FileSource:
    """Image files under relative names, from a folder or an archive.

    Labels are those of StyleGAN's dataset.json at the top, where there is one; else folders are classes.

    Args:
        title: the path, for people.
        stamps: {relative name: text that changes when the file does} of all files, images or not.
        read: name -> bytes; called from several threads.

    Raises:
        UserError: no images among them, splits where classes are expected, or a damaged dataset.json.
    """

    def __init__(self, title: str, stamps: dict[str, str], read: Callable[[str], bytes]):
        self.title = title
        self.names = images_among(stamps, title)
        self._read = read
        self.labels, self.class_names = self._stylegan_labels(stamps) or class_folders(self.names, title)
        listing = [self.class_names, self.names, self.labels, [stamps[name] for name in self.names]]
        self.listing_hash = hashlib.sha256(json.dumps(listing).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Record]:
        for name, label in zip(self.names, self.labels, strict=True):
            yield Record(name, label, partial(self._open, name))

    def _open(self, name: str) -> Image.Image:
        return open_image(self._read(name))

    def _stylegan_labels(self, stamps: dict[str, str]) -> tuple[list[int], list[str]] | None:
        if LABELS_FILE not in stamps:
            return None
        try:
            data = self._read(LABELS_FILE)
        except (DamagedImage, OSError) as error:
            raise UserError(f"{LABELS_FILE} of {self.title} cannot be read: {error}") from None
        return stylegan_labels(data, self.names, self.title)


def folder_source(folder: Path) -> FileSource:
    """All images in a folder and those below it; symbolic links are followed, each folder once.

    Raises:
        UserError: a folder that cannot be read, and as FileSource.
    """
    stamps, visited = {}, set()
    for parent, folders, files in os.walk(folder, followlinks=True, onerror=_cannot_read):
        where = os.stat(parent)
        if (where.st_dev, where.st_ino) in visited:  # a link back to a folder above
            folders.clear()
            continue
        visited.add((where.st_dev, where.st_ino))
        for file in files:
            path = os.path.join(parent, file)
            try:
                status = os.stat(path)
            except OSError as error:  # a dangling link: named with the damaged images if it was to be one
                stamps[os.path.relpath(path, folder).replace(os.sep, "/")] = error.strerror or "unreadable"
                continue
            if stat.S_ISREG(status.st_mode):  # reading a pipe would wait for ever
                stamp = f"{status.st_size} {status.st_mtime_ns}"
                stamps[os.path.relpath(path, folder).replace(os.sep, "/")] = stamp

    def read(name: str) -> bytes:
        path = folder / name
        check_file_size(path.stat().st_size)
        return path.read_bytes()

    return FileSource(str(folder), stamps, read)


def zip_source(archive: Path, inside: str = "") -> FileSource:
    """All images in a zip, or in one folder of it; they are read in place, nothing is extracted.

    Raises:
        UserError: a damaged archive, a folder that it does not have, and as FileSource.
    """
    try:
        opened = zipfile.ZipFile(archive)
    except Exception as error:  # not only BadZipFile: broken directories also give struct.error, ValueError, ...
        if of_the_system(error):
            raise
        raise UserError(f"{archive} is damaged or cut short: {error}") from None
    members = {info.filename.replace("\\", "/"): info for info in opened.infolist()}
    members = {name: info for name, info in members.items() if name and not name.endswith("/")}
    if inside:
        prefix = inside + "/"
        top = sorted({name.split("/")[0] for name in members if "/" in name})
        members = {name[len(prefix) :]: info for name, info in members.items() if name.startswith(prefix)}
        if not members:
            raise UserError(f"{archive} has no folder {inside!r}; it has {', '.join(top[:10]) or 'no folders'}")

    def read(name: str) -> bytes:
        check_file_size(members[name].file_size)
        try:
            return opened.read(members[name])
        except Exception as error:  # encrypted, broken, of an unknown method: every decompressor has its own
            raise DamagedImage(str(error) or type(error).__name__) from None

    stamps = {name: f"{info.file_size} {info.CRC:08x}" for name, info in members.items()}
    return FileSource(str(archive / inside), stamps, read)


def _cannot_read(error: OSError) -> None:
    raise UserError(f"cannot read the folder {error.filename}: {error.strerror}")
