"""Which kind of source a path is."""

from __future__ import annotations

import zipfile
from pathlib import Path

from biggan.data.files import folder_source, zip_source
from biggan.data.packed import SUFFIX, PackedSource
from biggan.data.records import ImageSource
from runtime.errors import UserError


def open_source(path: Path) -> ImageSource:
    """A folder, a zip, a folder inside a zip (`faces.zip/train`), or a packed file.

    Raises:
        UserError: none of these, or as `folder_source`, `zip_source` and `read_packed`.
    """
    if path.is_dir():
        return folder_source(path)
    archive = next((parent for parent in (path, *path.parents) if parent.is_file()), None)
    if archive is None:
        raise UserError(f"{path} does not exist; it can be a folder of images, a zip or a file of tools.prepare_images")
    if archive.suffix == SUFFIX:
        return PackedSource(archive)
    with archive.open("rb") as file:
        claims_zip = file.read(4) == b"PK\x03\x04"  # one that was cut short is no zip to `is_zipfile`
    if not claims_zip and not zipfile.is_zipfile(archive):
        raise UserError(f"{archive} is neither a folder of images, nor a zip, nor a file of tools.prepare_images")
    inside = path.relative_to(archive).as_posix()
    return zip_source(archive, "" if inside == "." else inside)
