"""The packed file: decoded images, labels and their description in one safetensors file that is mapped, not loaded.

Tensors `images` uint8 (N, 3, R, R) and `labels` int64 (N,); metadata `format`, `class_names` (JSON), `source`,
`fingerprint`, `resize_rule`. Any program that knows safetensors reads it.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import shutil
import struct
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image
from safetensors import safe_open

from biggan.data.dataset import ImageDataset
from biggan.data.decode import RESIZE_RULE
from biggan.data.records import Record
from runtime.errors import UserError

SUFFIX = ".safetensors"
_FORMAT = "biggan-images-1"


def write_packed(
    path: Path,
    samples: Iterable[tuple[np.ndarray, int]],
    *,
    capacity: int,
    resolution: int,
    class_names: list[str],
    source: str,
    fingerprint: str,
) -> int:
    """Writes images as they come, without holding them; the file appears under its name only when it is whole.

    Args:
        samples: pairs of uint8 (3, R, R) and label, at most `capacity`.

    Returns:
        the number of images written.

    Raises:
        UserError: not enough free space.
        OSError: the folder or disk refuses the file.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.writing")
    try:
        with temporary.open("wb") as file:
            writer = PackedWriter(file, path.parent, capacity, resolution, describe(class_names, source, fingerprint))
            for image, label in samples:
                writer.add(image, label)
            writer.finish()
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(writer.labels)


def describe(class_names: list[str], source: str, fingerprint: str) -> dict[str, str]:
    """The metadata of a packed file."""
    return {
        "format": _FORMAT,
        "class_names": json.dumps(class_names),
        "source": source,
        "fingerprint": fingerprint,
        "resize_rule": RESIZE_RULE,
    }


class PackedWriter:
    """Writes images to a file as they come, then labels and header.

    The format puts the number of images at the front, so room is left there for as many digits as `capacity` has.

    Args:
        file: open for writing bytes; emptied behind the images that it has.
        folder: where it is, to ask for free space.
        metadata: that of `describe`.
        labels: of images that the file already has, from an earlier writer.

    Raises:
        UserError: not enough free space.
    """

    def __init__(
        self,
        file: BinaryIO,
        folder: Path,
        capacity: int,
        resolution: int,
        metadata: dict[str, str],
        labels: Iterable[int] = (),
    ):
        self.labels = list(labels)
        self._file, self._resolution, self._metadata = file, resolution, metadata
        self._reserved = len(_header(capacity, resolution, metadata))
        self.begin = 8 + self._reserved  # of the images
        needed, free = (capacity - len(self.labels)) * 3 * resolution**2, shutil.disk_usage(folder).free
        if needed > free:
            raise UserError(f"{folder} has {free / 2**30:.1f} GiB free; the images need {needed / 2**30:.1f} GiB")
        file.truncate(self.end)
        file.seek(self.end)

    @property
    def end(self) -> int:
        """Of the images so far."""
        return self.begin + len(self.labels) * 3 * self._resolution**2

    def add(self, image: np.ndarray, label: int) -> None:
        """uint8 (3, R, R) and its class."""
        self._file.write(image.tobytes())
        self.labels.append(label)

    def finish(self) -> None:
        """Writes the rest, down to the disk."""
        header = _header(len(self.labels), self._resolution, self._metadata)
        self._file.write(np.array(self.labels, dtype="<i8").tobytes())
        self._file.seek(0)
        self._file.write(struct.pack("<Q", self._reserved) + header.ljust(self._reserved))
        self._file.flush()
        os.fsync(self._file.fileno())


def read_packed(path: Path) -> ImageDataset:
    """Maps a packed file; images are read from disk when they are first used.

    Raises:
        UserError: cut short, not of this format, or of impossible contents.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise UserError(f"{path} holds no images: it was not written by tools.prepare_images")
            return ImageDataset(
                file.get_tensor("images"),
                file.get_tensor("labels"),
                json.loads(metadata["class_names"]),
                metadata["source"],
                metadata["fingerprint"],
                MappedFile(path).check,
            )
    except (UserError, OSError):
        raise
    except Exception as error:  # SafetensorError, KeyError, and what torch and JSON raise on values that no file has
        raise UserError(f"{path} is damaged or cut short: {error}") from None


class MappedFile:
    """Asks whether a mapped file can still be read. The map itself would not raise an error but end the process."""

    def __init__(self, path: Path) -> None:
        self.path, self.file = path, path.open("rb")
        self.size = os.fstat(self.file.fileno()).st_size

    def check(self) -> None:
        """Raises OSError where its disk is gone, or where it is shorter than it was."""
        try:
            size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise OSError(error.errno, f"the images cannot be read any more ({error.strerror})", self.path) from None
        if size < self.size:
            raise OSError(errno.EIO, "the file of images was cut short while it was in use", self.path)


class PackedSource:
    """A packed file as records, for other resolutions than its own."""

    def __init__(self, path: Path):
        self.dataset = read_packed(path)
        self.title = str(path)
        self.class_names = self.dataset.class_names
        self.listing_hash = self.dataset.fingerprint
        self.resolution = self.dataset.resolution

    def check_resolution(self, resolution: int) -> None:
        """Raises UserError where the images would have to be enlarged."""
        if resolution > self.resolution:
            raise UserError(
                f"{self.title} holds images of {self.resolution} pixels: pack the originals with --size {resolution}"
            )

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[Record]:
        for index, label in enumerate(self.dataset.labels.tolist()):
            yield Record(f"image {index}", label, partial(self._open, index))

    def _open(self, index: int) -> Image.Image:
        return Image.fromarray(self.dataset.images[index].permute(1, 2, 0).contiguous().numpy())  # (R, R, 3)


def _header(count: int, resolution: int, metadata: dict[str, str]) -> bytes:
    """The JSON header, padded with spaces so that the images begin at a multiple of 8 bytes."""
    images, labels = count * 3 * resolution**2, count * 8
    header = {
        "__metadata__": metadata,
        "images": {"dtype": "U8", "shape": [count, 3, resolution, resolution], "data_offsets": [0, images]},
        "labels": {"dtype": "I64", "shape": [count], "data_offsets": [images, images + labels]},
    }
    text = json.dumps(header).encode()
    return text.ljust(-(-len(text) // 8) * 8)
