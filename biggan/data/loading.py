"""`open_images`: any source, decoded once, in parallel, into memory or into a mapped file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import torch

from biggan.data.dataset import ImageDataset
from biggan.data.decode import RESIZE_RULE
from biggan.data.decoding import MAX_DAMAGED_FRACTION, Damaged, decoded
from biggan.data.packed import SUFFIX, PackedSource, read_packed, write_packed
from biggan.data.records import ImageSource
from biggan.data.sources import open_source
from runtime.distributed import local_process_count

_IN_MEMORY_BYTES = 4 << 30


def open_images(
    source: str | Path,
    resolution: int,
    *,
    cache_dir: str | Path | None = None,
    workers: int | None = None,
    labels: bool = True,
    progress: bool = True,
    in_memory_bytes: int | None = None,
    max_damaged_fraction: float = MAX_DAMAGED_FRACTION,
) -> ImageDataset:
    """Opens a folder of images (flat, nested, one folder a class, CelebA-HQ), or whatever else `open_source` reads.

    Images are decoded once, by the rules of `square_rgb`. Damaged ones are named in a warning and left out.

    Args:
        source: the path; it may go on inside, as in `cifar10.zip/train`.
        resolution: side R of the images.
        cache_dir: where sets larger than `in_memory_bytes` are kept decoded, to be mapped now and found again by the
            next run; default `$XDG_CACHE_HOME/biggan` or `~/.cache/biggan`.
        workers: decoding threads; default one a core.
        labels: False puts all images into one class.
        progress: report on stderr.
        in_memory_bytes: default 4 GiB, or 0 where several processes of a machine can map one file.
        max_damaged_fraction: more damaged images than this fraction end the loading, as `Damaged` says.

    Raises:
        UserError: the source does not exist, is of no known kind, holds no images, or too many are damaged; a packed
            file smaller than `resolution`; no space for the cache.
        ValueError: resolution below 1.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    opened = open_source(Path(source).expanduser(), progress)
    if isinstance(opened, PackedSource):
        if opened.resolution == resolution:
            return _with_labels(opened.dataset, labels)
        opened.check_resolution(resolution)
    fingerprint = dataset_fingerprint(opened, resolution)
    if in_memory_bytes is None:
        in_memory_bytes = _IN_MEMORY_BYTES if local_process_count() == 1 else 0
    if len(opened) * 3 * resolution**2 <= in_memory_bytes:
        dataset = _into_memory(opened, resolution, fingerprint, workers, progress, max_damaged_fraction)
    else:
        folder = Path(cache_dir) if cache_dir else _default_cache()
        cached = folder / f"{fingerprint}{SUFFIX}"
        if not cached.exists():
            folder.mkdir(parents=True, exist_ok=True)
            write_decoded(cached, opened, resolution, workers, progress, max_damaged_fraction)
        dataset = read_packed(cached)
    return _with_labels(dataset, labels)


def write_decoded(
    path: Path,
    source: ImageSource,
    resolution: int,
    workers: int | None = None,
    progress: bool = True,
    max_damaged_fraction: float = MAX_DAMAGED_FRACTION,
) -> int:
    """Decodes a source into a packed file and returns the number of images in it; arguments as of `open_images`.

    Processes that write one file at once write one each, the same; the last to finish stays.
    """
    return write_packed(
        path,
        decoded(source, resolution, workers, progress, Damaged(source, max_damaged_fraction)),
        capacity=len(source),
        resolution=resolution,
        class_names=source.class_names,
        source=source.title,
        fingerprint=dataset_fingerprint(source, resolution),
    )


def dataset_fingerprint(source: ImageSource, resolution: int) -> str:
    """Hexadecimal name of the decoded data set: equal listing, resolution and resize rule give equal images."""
    return hashlib.sha256(f"{source.listing_hash} {resolution} {RESIZE_RULE}".encode()).hexdigest()[:32]


def _into_memory(
    source: ImageSource, resolution: int, fingerprint: str, workers: int | None, progress: bool, max_damaged: float
) -> ImageDataset:
    images = np.empty((len(source), 3, resolution, resolution), dtype=np.uint8)
    labels = []
    for image, label in decoded(source, resolution, workers, progress, Damaged(source, max_damaged)):
        images[len(labels)] = image
        labels.append(label)
    kept = len(labels)
    return ImageDataset(
        torch.from_numpy(images[:kept]), torch.tensor(labels), source.class_names, source.title, fingerprint
    )


def _with_labels(dataset: ImageDataset, labels: bool) -> ImageDataset:
    if labels or dataset.num_classes == 1:
        return dataset
    return ImageDataset(dataset.images, None, None, dataset.source, dataset.fingerprint, dataset.check)


def _default_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "biggan"
