"""Tar files of images: the shards of webdataset, or any plain tar.

Files with the same name up to the first dot are one sample: an image, and its label in `.cls` (a number) or in `.json`
(its "label" or "cls"). Where no sample has either, the folders inside are the classes, as in a zip.

Read with the standard library's tarfile, not with the webdataset package: that one streams a shard from its beginning,
while decoding in threads, and going on after an interruption, want each image by its place. So the headers are read
once, to an index of offsets, and an image is one read of its bytes. Nothing is extracted. A compressed tar has no such
places, and its images gain nothing by it.

Source: https://github.com/webdataset/webdataset, "The WebDataset Format".
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from biggan.data.decode import DamagedImage, check_file_size, open_image
from biggan.data.labels import checked_labels
from biggan.data.listing import EXTENSIONS, class_folders, images_among
from biggan.data.records import IndexedSource, file_stamp
from runtime.errors import UserError, of_the_system
from runtime.progress import track

SUFFIX = ".tar"
_MAX_LABEL_BYTES = 1 << 20


@dataclass
class _Index:
    """What is in all shards: {name: (shard, offset, size)} and {sample: label}; names begin with their shard's."""

    files: dict[str, tuple[Path, int, int]] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


def tar_source(path: Path, progress: bool = True) -> IndexedSource:
    """Opens a tar, or the shards of a folder in the order of their names, and lists what is in them.

    Raises:
        UserError: a damaged tar, no images, or labels that are no classes or that some images lack.
    """
    shards = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    index = _Index()
    total = sum(shard.stat().st_size >> 20 for shard in shards)
    scan = (mib for shard in shards for mib in _scan(shard, index))
    for _ in track(scan, total, f"listing {path} (MiB)", progress):
        pass
    names = _one_a_sample(images_among(index.files, str(path)))
    if index.labels:
        missing = [name for name in names if _sample(name) not in index.labels]
        if missing:
            raise UserError(f"{path}: {len(missing):,} of {len(names):,} images have no label, {missing[0]} for one")
        labels, class_names = checked_labels([index.labels[_sample(name)] for name in names], f"the labels in {path}")
    else:
        values, class_names = class_folders([name.partition("/")[2] for name in names], str(path))
        labels = np.array(values, dtype=np.int64)

    def read(number: int) -> Image.Image:
        shard, offset, size = index.files[names[number]]
        check_file_size(size)
        with shard.open("rb") as file:
            file.seek(offset)
            data = file.read(size)
        if len(data) < size:
            raise DamagedImage("the tar was cut short")
        return open_image(data)

    stamp = [names, [[shard.name, file_stamp(shard)] for shard in shards]]
    return IndexedSource(str(path), labels, class_names, stamp, names.__getitem__, read)


def _scan(shard: Path, index: _Index) -> Iterator[None]:
    """Adds the files of a shard to the index, and yields once a MiB."""
    said = 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in _members(tar, shard):
                if member.isreg():
                    name = f"{shard.name}/{member.name.removeprefix('./')}"
                    index.files[name] = (shard, member.offset_data, member.size)
                    label = _label(tar, member)
                    if label is not None:
                        index.labels[_sample(name)] = label
                for _ in range(said, member.offset_data >> 20):
                    yield
                said = max(said, member.offset_data >> 20)
    except UserError:
        raise
    except Exception as error:  # TarError, and on broken headers ValueError, MemoryError, RecursionError, ...
        if of_the_system(error):
            raise
        raise UserError(f"{shard} is damaged, cut short or no tar: {error}") from None


def _members(tar: tarfile.TarFile, shard: Path) -> Iterator[tarfile.TarInfo]:
    """All members. tarfile itself takes a broken header, or a file that ends too early, for the end of the archive."""
    size, before = shard.stat().st_size, -1
    while (member := tar.next()) is not None:
        tar.members.clear()  # it would hold a kilobyte for each
        if member.size < 0 or member.offset <= before or member.isreg() and member.offset_data + member.size > size:
            raise UserError(f"{shard} is damaged or cut short, at byte {member.offset:,}")
        before = member.offset
        yield member
    with shard.open("rb") as file:
        file.seek(tar.offset)
        end = file.read(tarfile.BLOCKSIZE)
    if len(end) < tarfile.BLOCKSIZE or any(end):
        raise UserError(f"{shard} is damaged or cut short, at byte {tar.offset:,}")


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """The label that a .cls or .json holds; None of other files."""
    kind = member.name.rpartition("/")[2].partition(".")[2].lower()
    if kind not in ("cls", "json"):
        return None
    if member.size > _MAX_LABEL_BYTES:
        raise UserError(f"{member.name} in {tar.name} has {member.size:,} bytes, too many for a label")
    text = tar.extractfile(member).read()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError(f"{member.name} in {tar.name} is damaged: {text[:40]!r}") from None
    if kind == "json":
        content = content.get("label", content.get("cls")) if isinstance(content, dict) else None
        if content is None:
            return None
    if type(content) is not int or abs(content) >= 1 << 63:
        raise UserError(f"the label in {member.name} of {tar.name} must be a whole number, not {str(content)[:40]!r}")
    return content


def _one_a_sample(names: list[str]) -> list[str]:
    """Without a.seg.png where there is a.jpg: only that is the image of the sample."""
    plain = {_sample(name) for name in names if _is_plain(name)}
    return [name for name in names if _is_plain(name) or _sample(name) not in plain]


def _is_plain(name: str) -> bool:
    return name.rpartition("/")[2].partition(".")[2].lower() in EXTENSIONS


def _sample(name: str) -> str:
    """The name up to the first dot of its last part."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]
