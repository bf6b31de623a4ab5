"""Which kind of source a path is."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

from biggan.data import hdf5, lmdb, packed, parquet, tar
from biggan.data.files import folder_source, zip_source
from biggan.data.hdf5 import hdf5_source
from biggan.data.listing import EXTENSIONS
from biggan.data.lmdb import lmdb_source
from biggan.data.lmdb_pages import MAGIC, MAGIC_AT
from biggan.data.packed import PackedSource
from biggan.data.parquet import parquet_source, shards_of_split
from biggan.data.records import ImageSource
from biggan.data.tar import tar_source
from runtime.errors import UserError

_KINDS = "a folder of images, a zip, tar, HDF5, LMDB or Parquet file, or a file of tools.prepare_images"


def open_source(path: Path, progress: bool = True) -> ImageSource:
    """A folder of images, tars, Parquet files or an LMDB; a zip, tar, HDF5, LMDB or Parquet file; or a packed file.

    A path may go on inside: a folder of a zip (`faces.zip/train`), a resolution of an LMDB (`faces.lmdb/256`), a split
    of a folder of Parquet files (`data/train`).

    Args:
        progress: say on stderr how far the listing of a large file is.

    Raises:
        UserError: none of these, or as the function of each kind.
    """
    if path.is_dir():
        return _folder(path, progress)
    outer = next((parent for parent in (path, *path.parents) if parent.exists()), None)
    inside = path.relative_to(outer).as_posix() if outer and outer != path else ""
    if outer and outer.is_file():
        return _file(outer, inside, progress)
    if (path.parent / lmdb.DATA_FILE).is_file():
        return lmdb_source(path.parent, path.name, progress)
    if shards := shards_of_split(path):
        return parquet_source(path, shards, progress)
    raise UserError(f"{path} does not exist; it can be {_KINDS}")


def _folder(path: Path, progress: bool) -> ImageSource:
    """Other files count only where there are neither images nor folders, which may be classes, beside them."""
    try:
        with os.scandir(path) as entries:
            visible = [entry for entry in entries if not entry.name.startswith(".")]
            folders = any(entry.is_dir() for entry in visible)
    except OSError as error:
        raise UserError(f"cannot read the folder {path}: {error.strerror}") from None
    extensions = {Path(entry.name).suffix.lower() for entry in visible}
    if any(entry.name == lmdb.DATA_FILE for entry in visible):
        return lmdb_source(path, progress=progress)
    if not folders and not extensions & {f".{extension}" for extension in EXTENSIONS}:
        if parquet.SUFFIX in extensions:
            return parquet_source(path, progress=progress)
        if tar.SUFFIX in extensions:
            return tar_source(path, progress)
    return folder_source(path)


def _file(path: Path, inside: str, progress: bool) -> ImageSource:
    """By its first bytes, or by its name: one that is damaged is still told what it was to be."""
    suffix = path.suffix.lower()
    if suffix == packed.SUFFIX:
        return PackedSource(path)
    with path.open("rb") as file:
        start = file.read(512)
    if start.startswith(b"PK\x03\x04") or zipfile.is_zipfile(path):  # one that was cut short is no zip to `is_zipfile`
        return zip_source(path, inside)
    if start[MAGIC_AT : MAGIC_AT + len(MAGIC)] == MAGIC:
        return lmdb_source(path, inside, progress)
    if inside:
        raise UserError(f"{path} is no folder, and no zip that could hold {inside!r}")
    if start.startswith(b"\x89HDF") or suffix in hdf5.SUFFIXES:
        return hdf5_source(path)
    if start.startswith(b"PAR1") or suffix == parquet.SUFFIX:
        return parquet_source(path, progress=progress)
    if start.startswith(b"\x1f\x8b"):
        raise UserError(f"{path} is compressed, so that no image can be read by its place: unpack it with gunzip first")
    if start[257:262] == b"ustar" or suffix == tar.SUFFIX:
        return tar_source(path, progress)
    raise UserError(f"{path} is neither {_KINDS.replace(', or', ', nor')}")
