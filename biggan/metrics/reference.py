"""Statistics of a data set's features: from the cache where it has them, else computed, and then cached."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch

from biggan.data.dataset import ImageDataset
from biggan.metrics.features import FeatureExtractor, holds
from biggan.metrics.moments import Moments
from biggan.metrics.passes import SavedPass
from biggan.metrics.statistics import FeatureProtocol, Statistics, load_statistics, save_statistics
from runtime.errors import UserError

BATCH_SIZE = 32
SPLITS = {"train", "val", "valid", "validation", "test"}


def protocol_of(extractor: FeatureExtractor, resolution: int, fingerprint: str, source: str) -> FeatureProtocol:
    folder = Path(source).name.lower()
    return FeatureProtocol(
        network=extractor.network.name,
        weights_hash=extractor.network.weights_hash,
        resize_rule=extractor.resize_rule,
        resolution=resolution,
        data_fingerprint=fingerprint,
        split=folder if folder in SPLITS else "all",
    )


def reference_statistics(
    dataset: ImageDataset,
    extractor: FeatureExtractor,
    protocol: FeatureProtocol,
    cache_dir: Path | None,
    *,
    keep_features: bool,
    resumable: bool,
    progress: bool,
) -> Statistics | None:
    """Mean and covariance of all features of the data set; in the main process, None in the others.

    Args:
        protocol: `protocol_of` these.
        cache_dir: where they are kept. Images without a fingerprint cannot be recognised again, and are not.
        keep_features: also the features themselves, mapped from a file in `cache_dir`, or in memory.
        resumable: SIGTERM and Ctrl-C stop the pass, which then goes on next time.

    Raises:
        RunError: stopped by a signal.
    """
    processes, dim = extractor.device.processes, extractor.network.feature_dim
    folder = cache_dir if dataset.fingerprint else None
    path = folder and folder / f"statistics-{protocol.digest()}.npz"
    features_path = folder and folder / f"features-{protocol.digest()}.npy"
    cached = _cached(path, protocol, features_path if keep_features else None) if path and processes.is_main else None
    if processes.from_main(lambda: cached is not None):
        return cached

    saved = SavedPass(folder / f"unfinished-{protocol.digest()}" if folder and resumable else None, processes)
    moments = Moments(dim, extractor.sums_device)
    parts = {"moments": moments} if processes.is_main else {}
    if keep_features and processes.is_main:
        parts["features"] = saved.rows("features", len(dataset), (dim,), np.float32)
    first = saved.resume(parts)
    batches = (dataset.take(rows)[0] for rows in torch.arange(first, len(dataset)).split(BATCH_SIZE))
    for images in saved.batches(batches, first, len(dataset), "features of the data set", progress):
        features, _ = extractor.extract(images)
        for part in parts.values():
            part.update(features)
    if not processes.is_main:
        return None
    features = parts["features"].array if keep_features else None
    statistics = Statistics(
        moments.mean.cpu().numpy(), moments.covariance.cpu().numpy(), moments.count, protocol, features
    )
    if path is not None:
        try:
            statistics = _cache(statistics, path, features_path)
        except OSError as error:  # a result without a cache is better than none
            warnings.warn(f"cannot cache the statistics in {path}: {error.strerror or error}", stacklevel=2)
    saved.remove()
    return statistics


def _cached(path: Path, protocol: FeatureProtocol, features_path: Path | None) -> Statistics | None:
    if not path.exists():
        return None
    try:
        statistics = load_statistics(path, protocol)
    except UserError as error:
        warnings.warn(f"{error}; computing the statistics anew", stacklevel=2)
        return None
    if features_path is None:
        return statistics
    if not holds(features_path, (statistics.count, len(statistics.mean)), np.float32):
        return None
    return _with_features(statistics, features_path)


def _cache(statistics: Statistics, path: Path, features_path: Path) -> Statistics:
    """Features lie in a file of their own, which can be mapped."""
    features, bare = statistics.features, _with_features(statistics, None)
    save_statistics(path, bare)
    if features is None:
        return bare
    temporary = features_path.with_name(f".{os.getpid()}-{features_path.name}")
    np.save(temporary, features)
    os.replace(temporary, features_path)
    return _with_features(bare, features_path)


def _with_features(statistics: Statistics, path: Path | None) -> Statistics:
    features = None if path is None else np.load(path, mmap_mode="c")  # torch takes no arrays that are read-only
    return Statistics(statistics.mean, statistics.covariance, statistics.count, statistics.protocol, features)
