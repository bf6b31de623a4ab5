"""Images in an HDF5 file as BigGAN-PyTorch's make_hdf5.py writes it (ILSVRC128.hdf5).

Datasets `imgs` uint8 (N, 3, R, R) and `labels` int64 (N,), in chunks of 500 images, compressed by lzf or not at all.

Source: https://github.com/ajbrock/BigGAN-PyTorch, make_hdf5.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from biggan.data.decode import DamagedImage
from biggan.data.extras import optional_package
from biggan.data.labels import checked_labels, no_labels
from biggan.data.records import IndexedSource, file_stamp
from runtime.errors import UserError, of_the_system

SUFFIXES = (".hdf5", ".h5")
IMAGES, LABELS = "imgs", "labels"
_MAX_SIDE = 8192
_MAX_RATIO = 1100  # deflate gains at most 1032:1; a file that claims more holds nothing, and would fill the memory
_MAX_CHUNK_BYTES = 1 << 30
_CACHED_BYTES = 512 << 20
_CACHED_CHUNKS = 4  # threads work on neighbouring images: a compressed chunk is inflated once for all of its images


def hdf5_source(path: Path) -> IndexedSource:
    """Opens the file and reads its labels; images are read one by one, when they are decoded.

    A file without `labels` is one class. Reading is serial, by a lock of h5py; decoding is not.

    Raises:
        UserError: h5py is missing, a damaged file, no `imgs`, arrays of other shapes or types, absurd sizes, or labels
            that are no classes.
    """
    h5py = optional_package("h5py", "hdf5", f"reading {path}")
    try:
        with h5py.File(path, "r") as file:
            images = _dataset(file, IMAGES, path)
            if images is None:
                raise UserError(f"{path} has no dataset {IMAGES!r}; it has {', '.join(list(file)[:10]) or 'nothing'}")
            _check(images, path)
            shape, chunk = images.shape, images.chunks
            labels, class_names = _labels(_dataset(file, LABELS, path), len(images), path)
        one = int(np.prod(chunk)) if chunk else 0
        cache = max(one, min(_CACHED_CHUNKS * one, _CACHED_BYTES))
        file = h5py.File(path, "r", rdcc_nbytes=max(cache, 1 << 20), rdcc_nslots=10_007)
        images = file[IMAGES]
    except UserError:
        raise
    except Exception as error:  # h5py turns what its library says into OSError, KeyError, RuntimeError, ValueError, ...
        if of_the_system(error):
            raise
        raise UserError(f"{path} is damaged, cut short or no HDF5 file: {error}") from None

    def read(index: int) -> Image.Image:
        try:
            pixels = images[index]  # (3, R, R)
        except Exception as error:  # as above; a damaged chunk
            raise DamagedImage(str(error) or type(error).__name__) from None
        return Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))

    stamp = [file_stamp(path), list(shape)]
    return IndexedSource(str(path), labels, class_names, stamp, "image {}".format, read)


def _dataset(file: Any, name: str, path: Path) -> Any:
    """A dataset of the file, or None; not one that a link leads to in another file."""
    if name not in file:
        return None
    found = file[name]
    if not hasattr(found, "dtype") or found.file.filename != file.filename:
        raise UserError(f"{name!r} in {path} must be a dataset of that file")
    return found


def _check(images: Any, path: Path) -> None:
    """Refuses before anything is allocated."""
    shape, side = images.shape, images.shape[-1] if images.shape else 0
    if images.dtype != np.uint8 or len(shape) != 4 or shape[1:] != (3, side, side) or side == 0:
        raise UserError(f"{IMAGES!r} in {path} must be uint8 (N, 3, R, R), not {images.dtype} {shape}")
    if len(images) == 0:
        raise UserError(f"no images in {path}: {IMAGES!r} is empty")
    claimed, stored = len(images) * 3 * side**2, path.stat().st_size
    if side > _MAX_SIDE or claimed > _MAX_RATIO * stored or images.external or images.is_virtual:
        raise UserError(
            f"{path} claims {len(images):,} images of {side} x {side}, which its {stored:,} bytes cannot hold"
        )
    if images.chunks and np.prod(images.chunks, dtype=object) > _MAX_CHUNK_BYTES:
        raise UserError(f"{path} is stored in chunks of {images.chunks}: more than one GiB each")


def _labels(labels: Any, count: int, path: Path) -> tuple[np.ndarray, list[str]]:
    if labels is None:
        return no_labels(count)
    where = f"{LABELS!r} in {path}"
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise UserError(f"{where} must be int64 ({count},), not {labels.dtype} {labels.shape}")
    return checked_labels(labels[:], where)
