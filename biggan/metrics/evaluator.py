"""Metrics of generated images against a data set: one pass over the images feeds every metric asked for."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from biggan.data.dataset import ImageDataset
from biggan.metrics.frechet import frechet_distance
from biggan.metrics.inception import FIDInception
from biggan.metrics.inception_weights import load_inception
from biggan.metrics.moments import Moments
from biggan.metrics.resize import check_resize_rule
from biggan.metrics.statistics import FeatureProtocol, Statistics, load_statistics, save_statistics
from biggan.metrics.swd import pyramid_levels, sliced_wasserstein
from runtime.device import Device
from runtime.errors import UserError
from runtime.progress import track

REFERENCE_BATCH_SIZE = 32
SWD_MAX_IMAGES = 16384  # as in Karras et al. 2018; bounds the memory
SWD_SEED = 0


@dataclass(frozen=True)
class EvaluationOptions:
    """What `evaluate` passes on to every evaluator; see there."""

    inception: FIDInception | str | Path | None
    resize_rule: str
    cache_dir: Path | None
    device: Device
    progress: bool


class Evaluator(Protocol):
    """One metric. Made before any image is generated, so that whatever can be wrong is said first.

    Of several processes all make it and update it, and the first one runs it.
    """

    protocol: dict[str, str | int]

    def __init__(self, dataset: ImageDataset, num_images: int, options: EvaluationOptions) -> None: ...

    def update(self, images: Tensor) -> None:
        """Take the next generated images, uint8 (B, 3, R, R)."""

    def run(self) -> Iterator[tuple[str, float]]:
        """Yield (name, value); the name carries the number of images."""


class FidEvaluator:
    """Fréchet Inception distance of `num_images` generated images to all images of the data set."""

    def __init__(self, dataset: ImageDataset, num_images: int, options: EvaluationOptions) -> None:
        self.options = options
        smallest = min(num_images, len(dataset))
        if smallest < 2:
            raise UserError("the FID needs at least 2 images on each side")
        to_load = options.inception is None or isinstance(options.inception, str | Path)
        self.network = load_inception(options.inception) if to_load else options.inception
        options.device.put_network(self.network, torch.contiguous_format)
        self._extract = options.device.compile_step(self._extract_all_rows)
        if smallest <= self.network.feature_dim:
            warnings.warn(
                f"FID of {smallest} images: fewer than {self.network.feature_dim + 1} leave the covariance singular "
                f"and bias the distance upwards; compare it only with distances of the same number of images",
                stacklevel=3,
            )
        self.batch_size = 0  # the largest so far
        on_host = options.device.kind == "xla"  # a TPU has no float64
        self.moments_device = torch.device("cpu") if on_host else options.device.torch_device
        self.reference = self._reference_statistics(dataset)
        self.moments = self._new_moments()
        self.protocol = {**asdict(self.reference.protocol), "reference_count": self.reference.count}

    def update(self, images: Tensor) -> None:
        self.moments.update(self._features(images))

    def run(self) -> Iterator[tuple[str, float]]:
        distance = frechet_distance(
            self.moments.mean, self.moments.covariance, self.reference.mean, self.reference.covariance
        )
        yield f"fid{format_count(self.moments.count)}", distance

    def _features(self, images: Tensor) -> Tensor:
        """Features of a batch, which devices and processes share; each process reads its own images only.

        The last image is repeated until they can share evenly, and up to the largest batch so far where each size
        costs a compilation.
        """
        count, device = len(images), self.options.device
        size = max(self.batch_size, count) if device.compiles_each_shape else count
        self.batch_size = size + -size % device.num_shards
        own = images[device.local_rows(self.batch_size).clamp(max=count - 1).to(images.device)]
        return self._extract(device.put(own.cpu(), batch_dim=0, local=True)).to(self.moments_device)[:count]

    def _extract_all_rows(self, images: Tensor) -> Tensor:
        return self.options.device.all_rows(self.network(images, self.options.resize_rule))

    def _new_moments(self) -> Moments:
        return Moments(self.network.feature_dim, self.moments_device)

    def _reference_statistics(self, dataset: ImageDataset) -> Statistics:
        """From the cache where it has them, else computed, and then cached."""
        protocol = FeatureProtocol(
            network=self.network.name,
            weights_hash=self.network.weights_hash,
            resize_rule=self.options.resize_rule,
            resolution=dataset.resolution,
            data_fingerprint=dataset.fingerprint,
        )
        path, processes = None, self.options.device.processes
        if self.options.cache_dir and dataset.fingerprint:  # images without a fingerprint cannot be recognised again
            path = self.options.cache_dir / f"statistics-{protocol.digest()}.npz"
            if cached := processes.from_main(lambda: _cached_statistics(path, protocol)):
                return cached
        moments = self._new_moments()
        batches = dataset.images.split(REFERENCE_BATCH_SIZE)
        for images in track_batches(batches, len(dataset), "features of the data set", self.options.progress):
            moments.update(self._features(images))
        statistics = Statistics(moments.mean.cpu().numpy(), moments.covariance.cpu().numpy(), moments.count, protocol)
        if path is not None and processes.is_main:
            try:
                save_statistics(path, statistics)
            except OSError as error:  # a result without a cache is better than none
                warnings.warn(f"cannot cache the statistics in {path}: {error.strerror or error}", stacklevel=2)
        return statistics


def _cached_statistics(path: Path, protocol: FeatureProtocol) -> Statistics | None:
    if not path.exists():
        return None
    try:
        return load_statistics(path, protocol)
    except UserError as error:
        warnings.warn(f"{error}; computing the statistics anew", stacklevel=2)
        return None


class SwdEvaluator:
    """Sliced Wasserstein distance of the first `num_images` generated images to as many random ones of the data set."""

    def __init__(self, dataset: ImageDataset, num_images: int, options: EvaluationOptions) -> None:
        try:
            pyramid_levels(dataset.resolution)
        except ValueError as error:
            raise UserError(str(error)) from error
        self.num_images = min(num_images, len(dataset), SWD_MAX_IMAGES)
        self.protocol = {"images_per_side": self.num_images, "seed": SWD_SEED, "data_fingerprint": dataset.fingerprint}
        if not options.device.processes.is_main:
            self.num_images = 0  # all is computed in one process, which alone keeps images
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SWD_SEED))[: self.num_images]
        self.real = dataset.take(chosen.sort().values)[0]
        self.fake = torch.empty_like(self.real)
        self.filled = 0
        self.progress = options.progress

    def update(self, images: Tensor) -> None:
        images = images[: self.num_images - self.filled]
        self.fake[self.filled : self.filled + len(images)] = images.cpu()
        self.filled += len(images)

    def run(self) -> Iterator[tuple[str, float]]:
        prefix = f"swd{format_count(self.num_images)}"
        distances = sliced_wasserstein(self.real, self.fake, seed=SWD_SEED, progress=self.progress)
        for name, value in distances.items():
            yield name.replace("swd", prefix), value


METRICS: dict[str, type[Evaluator]] = {"fid": FidEvaluator, "swd": SwdEvaluator}


class Evaluation(dict[str, float]):
    """Metric name -> value.

    Attributes:
        protocol: metric -> what its number depends on (network, resize rule, reference, number of images).
    """

    protocol: dict[str, dict[str, str | int]]


def evaluate(
    fake_batches: Iterable[Tensor],
    num_images: int,
    dataset: ImageDataset,
    metrics: Sequence[str],
    *,
    inception: FIDInception | str | Path | None = None,
    resize_rule: str = "pytorch-fid",
    cache_dir: str | Path | None = None,
    device: Device | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure generated images against a data set.

    Args:
        fake_batches: uint8 (B, 3, R, R) each, on any device; `num_images` images in all.
        metrics: names of `METRICS`.
        inception: the network, its weights file, or None to find or download the file (`load_inception`).
        resize_rule: how the FID's network sees the images (`resize.RESIZE_RULES`).
        cache_dir: where reference statistics are kept; None computes them each time.
        device: where the feature network runs; default the CPU. Its processes must all call this, and all get the
            values.

    Returns:
        For example {"fid5k": 21.3, "swd5k_64": 9.1, "swd5k_32": 8.2, "swd5k_16": 10.4, "swd5k": 9.2}.

    Raises:
        UserError: an unknown metric, weights that cannot be had, too few images, a resolution a metric does not take.
        ValueError: another number or form of generated images than announced, or an unknown resize rule.
    """
    check_metrics(metrics)
    check_resize_rule(resize_rule)
    device = device or Device()
    options = EvaluationOptions(
        inception=inception,
        resize_rule=resize_rule,
        cache_dir=Path(cache_dir) if cache_dir else None,
        device=device,
        progress=progress and device.processes.is_main,
    )
    evaluators = {name: METRICS[name](dataset, num_images, options) for name in metrics}
    image_shape = (3, dataset.resolution, dataset.resolution)
    seen = 0
    for images in track_batches(fake_batches, num_images, "generated images", options.progress):
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != image_shape:
            raise ValueError(
                f"expected uint8 images (B, {', '.join(map(str, image_shape))}) like the data set's, "
                f"got {images.dtype} {tuple(images.shape)}"
            )
        for evaluator in evaluators.values():
            evaluator.update(images)
        seen += len(images)
    if seen != num_images:
        raise ValueError(f"expected {num_images} generated images, got {seen}")
    pairs = device.processes.from_main(lambda: [pair for evaluator in evaluators.values() for pair in evaluator.run()])
    values = Evaluation(pairs)
    values.protocol = {name: evaluator.protocol for name, evaluator in evaluators.items()}
    return values


def track_batches(batches: Iterable[Tensor], num_images: int, description: str, enabled: bool) -> Iterator[Tensor]:
    """Yields the batches and shows the progress in batches, all taken to be as large as the first."""
    batches = iter(batches)
    first = next(batches, None)
    if first is not None:
        total = math.ceil(num_images / max(1, len(first)))
        yield from track(chain([first], batches), total, f"{description}, batches", enabled)


def check_metrics(metrics: Sequence[str]) -> None:
    """Raises UserError, listing the metrics there are, for a name that is none or where there is no name."""
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics:
        problem = f"unknown metric {unknown[0]!r}" if unknown else "no metric given"
        raise UserError(f"{problem}; choose from {', '.join(METRICS)}")


def format_count(count: int) -> str:
    """50000 -> "50k", 512 -> "512"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
