"""`open_images`: any source, decoded once, in parallel, into memory or into a mapped file."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from biggan.data.dataset import ImageDataset
from biggan.data.decode import RESIZE_RULE, DamagedImage, square_rgb
from biggan.data.packed import SUFFIX, PackedSource, read_packed, write_packed
from biggan.data.records import ImageSource, Record
from biggan.data.sources import open_source
from runtime.distributed import local_process_count
from runtime.errors import UserError
from runtime.progress import track

MAX_DAMAGED_FRACTION = 0.05
_CHUNK = 32  # images a task: the overhead of a task spread over enough work
_IN_MEMORY_BYTES = 4 << 30
_NAMED = 10  # damaged images named in a message


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
    """Opens a folder of images (flat, nested, one folder a class, CelebA-HQ), a zip of such, or a packed file.

    Images are decoded once, by the rules of `square_rgb`. Damaged ones are named in a warning and left out.

    Args:
        source: the path; it may go on inside a zip, as in `cifar10.zip/train`.
        resolution: side R of the images.
        cache_dir: where sets larger than `in_memory_bytes` are kept decoded, to be mapped now and found again by the
            next run; default `$XDG_CACHE_HOME/biggan` or `~/.cache/biggan`.
        workers: decoding threads; default one a core.
        labels: False puts all images into one class.
        progress: report on stderr.
        in_memory_bytes: default 4 GiB, or 0 where several processes of a machine can map one file.
        max_damaged_fraction: more damaged images than this fraction end the loading. A few are forgiven in small sets:
            up to ten, if at least two thirds are sound. 0 accepts none at all.

    Raises:
        UserError: the source does not exist, is of no known kind, holds no images, or too many are damaged; a packed
            file smaller than `resolution`; no space for the cache.
        ValueError: resolution below 1.
    """
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    opened = open_source(Path(source).expanduser())
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
    """Decodes a source into a packed file and returns the number of images in it; arguments as of `open_images`."""
    return write_packed(
        path,
        decoded(source, resolution, workers, progress, max_damaged_fraction),
        capacity=len(source),
        resolution=resolution,
        class_names=source.class_names,
        source=source.title,
        fingerprint=dataset_fingerprint(source, resolution),
    )


def dataset_fingerprint(source: ImageSource, resolution: int) -> str:
    """Hexadecimal name of the decoded data set: equal listing, resolution and resize rule give equal images."""
    return hashlib.sha256(f"{source.listing_hash} {resolution} {RESIZE_RULE}".encode()).hexdigest()[:32]


def decoded(
    source: ImageSource, resolution: int, workers: int | None, progress: bool, max_damaged_fraction: float
) -> Iterator[tuple[np.ndarray, int]]:
    """Pairs of uint8 (3, R, R) and label in the order of the source, without the damaged images.

    Raises:
        UserError: too many are damaged; raised as soon as that is certain.
    """
    total = len(source)
    allowed = max(int(max_damaged_fraction * total), min(10, total // 3)) if max_damaged_fraction > 0 else 0
    damaged: list[str] = []
    results = _decode_in_order(source, resolution, workers or os.cpu_count() or 1)
    for record, image in track(results, total, f"decoding {source.title}", progress):
        if isinstance(image, np.ndarray):
            yield image, record.label
            continue
        damaged.append(f"{record.name} ({image})")
        if len(damaged) > allowed or len(damaged) == total:
            raise UserError(f"too many damaged images among the {total:,} in {source.title}: {_some(damaged)}")
    if damaged:
        message = f"left out {len(damaged)} damaged of {total:,} images in {source.title}: {_some(damaged)}"
        warnings.warn(message, stacklevel=2)


def _decode_in_order(
    source: ImageSource, resolution: int, workers: int
) -> Iterator[tuple[Record, np.ndarray | Exception]]:
    """Decodes in threads (Pillow releases the interpreter lock), a bounded number of chunks ahead of the consumer."""

    def decode(records: list[Record]) -> list[tuple[Record, np.ndarray | Exception]]:
        return [(record, _decode(record, resolution)) for record in records]

    records = iter(source)
    with ThreadPoolExecutor(workers) as pool:
        ahead: deque = deque()
        while chunk := list(islice(records, _CHUNK)):
            ahead.append(pool.submit(decode, chunk))
            if len(ahead) > 2 * workers:
                yield from ahead.popleft().result()
        while ahead:
            yield from ahead.popleft().result()


def _decode(record: Record, resolution: int) -> np.ndarray | Exception:
    try:
        return square_rgb(record.open(), resolution)
    except (DamagedImage, OSError) as error:
        return error


def _into_memory(
    source: ImageSource, resolution: int, fingerprint: str, workers: int | None, progress: bool, max_damaged: float
) -> ImageDataset:
    images = np.empty((len(source), 3, resolution, resolution), dtype=np.uint8)
    labels = []
    for image, label in decoded(source, resolution, workers, progress, max_damaged):
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


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
