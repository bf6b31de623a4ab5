"""Archives of others, read in place and within bounds: nothing is unpacked to disk, and no bomb fills the memory."""

from __future__ import annotations

import bz2
import gzip
import lzma
import tarfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from runtime.errors import UserError

MAX_TAR_BYTES = 1 << 30  # unpacked; the largest archive read here, of film reviews, has 0.3 GiB
_MAX_READ_BYTES = 1 << 24  # at once; a name and its attributes are one read
_MAX_RATIO, _FREE_BYTES = 100, 1 << 30  # numbers shrink to a hundredth at most; small archives may be anything
_OPENERS = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}  # by how a compressed file begins


@contextmanager
def open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    """A tar archive, compressed by gzip, bzip2 or xz or not at all, to be read in its own order.

    Raises:
        UserError: while it is read, where it unpacks to more than `MAX_TAR_BYTES`, or a name to more than 16 MiB.
    """
    with path.open("rb") as raw:
        opener = _OPENERS.get(raw.read(2), open)
    with opener(path, "rb") as file, tarfile.open(fileobj=_Bounded(file, path), mode="r:") as archive:
        yield archive


class _Bounded:
    """A file for tarfile, which reads what an archive claims, and seeks by unpacking all that lies between."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self.file, self.path = file, path
        self.tell = file.tell

    def seek(self, position: int) -> int:
        self._check(position, 0)
        return self.file.seek(position)

    def read(self, size: int) -> bytes:
        self._check(self.tell(), size)
        return self.file.read(size)

    def _check(self, position: int, size: int) -> None:
        if position + size > MAX_TAR_BYTES or size > _MAX_READ_BYTES:
            raise UserError(
                f"{self.path} is refused: it unpacks to more than {MAX_TAR_BYTES >> 30} GiB, or has names of more "
                f"than {_MAX_READ_BYTES >> 20} MiB."
            )


def check_npz(path: Path) -> None:
    """Looks at the table of contents of a numpy archive.

    Raises:
        UserError: it unpacks to more than a GiB and more than a hundred times its size.
        OSError, zipfile.BadZipFile, ...: it cannot be read.
    """
    with zipfile.ZipFile(path) as archive:
        unpacked = sum(member.file_size for member in archive.infolist())
    if unpacked > max(_FREE_BYTES, _MAX_RATIO * path.stat().st_size):
        raise UserError(f"{path} is refused: it unpacks to {unpacked / 2**30:,.1f} GiB.")
