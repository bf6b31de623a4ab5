"""Metrics of generated images against a data set: one pass over the images feeds every metric asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from biggan.data.dataset import ImageDataset
from biggan.metrics.features import FeatureExtractor
from biggan.metrics.inception import FIDInception
from biggan.metrics.measures import METRICS, Metric, MetricOptions, Setting
from biggan.metrics.networks import FeatureNetwork, default_resize_rule, load_network
from biggan.metrics.passes import Part, SavedPass, digest
from biggan.metrics.reference import protocol_of, reference_statistics
from biggan.metrics.resize import check_resize_rule
from biggan.metrics.statistics import Statistics, load_statistics
from runtime.device import Device
from runtime.errors import UserError


class Evaluation(dict[str, float]):
    """Metric name -> value.

    Attributes:
        protocol: metric -> what its numbers depend on (network, resize rule, reference, subsets).
        reference: statistics of the data set, in the main process; None where no metric needs them.
    """

    protocol: dict[str, dict[str, Any]]
    reference: Statistics | None


def evaluate(
    generated: Iterable[Tensor] | Callable[[int], Iterable[Tensor]],
    num_images: int,
    reference: ImageDataset | str | Path,
    metrics: Sequence[str],
    *,
    network: FeatureNetwork | str = FIDInception.name,
    network_weights: str | Path | None = None,
    resize_rule: str | None = None,
    options: MetricOptions | None = None,
    cache_dir: str | Path | None = None,
    source: Mapping[str, Any] | None = None,
    resolution: int | None = None,
    device: Device | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure generated images against a data set.

    Args:
        generated: batches, uint8 (B, 3, R, R), on any device, `num_images` images in all; or, with `source`, a function
            that gives the batches from an image number on.
        reference: the data set, or a file of its statistics.
        metrics: names of `METRICS`.
        network: a feature network or its name; network_weights: its file (`networks.load_network`).
        resize_rule: how the network sees the images (`resize.RESIZE_RULES`); default `networks.default_resize_rule`.
        cache_dir: where reference statistics are kept; None computes them each time.
        source: all that `generated` depends on. With it and `cache_dir`, SIGTERM and Ctrl-C stop the evaluation after a
            batch, and the same call goes on from there, with the same result.
        resolution: R; needed where the reference is a file.
        device: where the feature network runs; default the CPU. Its processes must all call this, and all get the
            values.

    Returns:
        For example {"fid5k": 21.3, "swd5k_64": 9.1, "swd5k_32": 8.2, "swd5k_16": 10.4, "swd5k": 9.2}.

    Raises:
        UserError: an unknown metric, weights that cannot be had, too few images, a resolution a metric does not take, a
            statistics file of another network, or without what a metric needs.
        RunError: stopped by a signal.
        ValueError: another number or form of generated images than announced, an unknown resize rule, or `source` with
            batches that cannot be asked for from a number on.
    """
    check_metrics(metrics)
    if resize_rule is not None:
        check_resize_rule(resize_rule)
    if source is not None and not callable(generated):
        raise ValueError("an evaluation goes on only where `generated` is a function of the first image's number")
    device, options = device or Device(), options or MetricOptions()
    processes = device.processes
    progress = progress and processes.is_main
    cache_dir = Path(cache_dir) if cache_dir else None
    needs = frozenset().union(*(METRICS[name].needs for name in metrics))
    dataset = reference if isinstance(reference, ImageDataset) else None
    if "data" in needs and dataset is None:
        raise UserError("swd compares with images: give --data, not a file of statistics.")
    resolution = dataset.resolution if dataset else resolution

    extractor = statistics = protocol = None
    if "network" in needs:
        network = load_network(network, network_weights) if isinstance(network, str) else network
        extractor = FeatureExtractor(network, resize_rule or default_resize_rule(network), device)
    if extractor and dataset:
        protocol = protocol_of(extractor, resolution, dataset.fingerprint, dataset.source)
    elif "reference" in needs:
        statistics = processes.from_main(lambda: _from_file(Path(reference), extractor, resolution, needs))
        protocol = statistics.protocol
    saved = SavedPass(_folder(cache_dir, source, num_images, metrics, options, extractor, reference), processes)
    setting = Setting(num_images, dataset, options, progress, saved, extractor, protocol, statistics)
    made: dict[str, Metric] = {}
    processes.from_main(lambda: made.update((name, METRICS[name](setting)) for name in metrics))
    if "reference" in needs and dataset:
        kept = {"keep_features": "features" in needs, "resumable": source is not None, "progress": progress}
        setting.reference = reference_statistics(dataset, extractor, protocol, cache_dir, **kept)

    parts: dict[str, Part] = dict(made)
    if "features" in needs and processes.is_main:
        setting.features = saved.rows("features", num_images, (extractor.network.feature_dim,), np.float32)
        parts["features"] = setting.features
    first = saved.resume(parts)
    batches = generated(first) if callable(generated) else generated
    seen = first
    for images in saved.batches(batches, first, num_images, "generated images", progress):
        _check(images, resolution)
        features, logits = extractor.extract(images) if extractor else (None, None)
        if setting.features:
            setting.features.update(features)
        for metric in made.values():
            metric.update(images, features, logits)
        seen += len(images)
    if seen != num_images:
        raise ValueError(f"expected {num_images} generated images, got {seen}")
    values, protocols = processes.from_main(
        lambda: (
            [pair for metric in made.values() for pair in metric.run()],
            {name: metric.protocol for name, metric in made.items()},
        )
    )
    saved.remove()
    evaluation = Evaluation(values)
    evaluation.protocol, evaluation.reference = protocols, setting.reference
    return evaluation


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises UserError, listing the metrics there are, for a name that is none or where there is no name."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        problem = f"unknown metric {unknown[0]!r}" if unknown else "no metric given"
        raise UserError(f"{problem}; choose from {', '.join(METRICS)}")


def _from_file(path: Path, extractor: FeatureExtractor, resolution: int, needs: frozenset[str]) -> Statistics:
    statistics = load_statistics(path, protocol_of(extractor, resolution, "", ""), of_any_data=True)
    if "features" in needs and statistics.features is None:
        raise UserError(f"{path} holds no features, which kid and prdc need: save it from a run with these metrics.")
    return statistics


def _folder(
    cache_dir: Path | None,
    source: Mapping[str, Any] | None,
    num_images: int,
    metrics: Sequence[str],
    options: MetricOptions,
    extractor: FeatureExtractor | None,
    reference: ImageDataset | str | Path,
) -> Path | None:
    """Where an unfinished evaluation lies; None where it is not to be kept."""
    if cache_dir is None or source is None:
        return None
    network = extractor and [extractor.network.name, extractor.network.weights_hash, extractor.resize_rule]
    against = reference.fingerprint if isinstance(reference, ImageDataset) else str(Path(reference).resolve())
    return (
        cache_dir / f"unfinished-{digest([dict(source), num_images, list(metrics), repr(options), network, against])}"
    )


def _check(images: Tensor, resolution: int) -> None:
    shape = (3, resolution, resolution)
    if images.dtype != torch.uint8 or tuple(images.shape[1:]) != shape:
        raise ValueError(
            f"expected uint8 images (B, {', '.join(map(str, shape))}) like the data set's, "
            f"got {images.dtype} {tuple(images.shape)}"
        )
