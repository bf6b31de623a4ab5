"""The metrics: each takes generated images, or their features, batch by batch, and yields its numbers at the end."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from biggan.data.dataset import ImageDataset
from biggan.metrics.confidence import MIN_IMAGES, ChunkedMoments, estimate
from biggan.metrics.features import FeatureExtractor, Rows
from biggan.metrics.frechet import FrechetReference
from biggan.metrics.inception import FIDInception
from biggan.metrics.inception_score import InceptionScore
from biggan.metrics.kid import default_subset_size, kernel_distances, standard_error
from biggan.metrics.passes import SavedPass
from biggan.metrics.prdc import DENSITY_COVERAGE_K, PRECISION_RECALL_K, precision_recall_density_coverage
from biggan.metrics.statistics import FeatureProtocol, Statistics
from biggan.metrics.swd import pyramid_levels, sliced_wasserstein
from runtime.errors import UserError

SWD_MAX_IMAGES = 16384  # as in Karras et al. 2018; bounds the memory
SWD_SEED = 0
FEW_IMAGES = 10_000


@dataclass(frozen=True)
class MetricOptions:
    """
    Attributes:
        confidence: with a Fréchet distance also its interval and its value at infinitely many images; 13 distances
            instead of one, half a minute on a CPU.
        kid_subset_size: default 1000, or half of a smaller set.
    """

    confidence: bool = False
    kid_subset_size: int | None = None
    kid_subsets: int = 100
    is_splits: int = 10


@dataclass
class Setting:
    """What metrics are made from.

    Attributes:
        dataset: None where its statistics come from a file.
        saved: gives the metrics files for what is too large to be saved again and again.
        extractor, protocol: None where no metric looks at features.
        reference: statistics of the data set, computed after the metrics are made, before any is updated.
        features: of the generated images, filled while they come; None where no metric needs them all.
    """

    num_images: int
    dataset: ImageDataset | None
    options: MetricOptions
    progress: bool
    saved: SavedPass
    extractor: FeatureExtractor | None
    protocol: FeatureProtocol | None
    reference: Statistics | None
    features: Rows | None = None

    @property
    def reference_count(self) -> int:
        return self.reference.count if self.reference else len(self.dataset)

    def protocol_with(self, **more: int) -> dict[str, Any]:
        return {**asdict(self.protocol), "reference_count": self.reference_count, **more}

    def both_sides(self) -> tuple[Tensor, Tensor]:
        """Features of the generated images and of the data set."""
        return self.features.tensor(), torch.from_numpy(np.asarray(self.reference.features))

    def name(self, metric: str) -> str:
        """With the number of images; the I in "fid" and "kid" is for the features of the FID's own network."""
        kind = metric if self.extractor.network.name == FIDInception.name else metric.replace("i", "")
        return f"{kind}{format_count(self.num_images)}"


class Metric(Protocol):
    """Made before any image is generated, so that whatever can be wrong is said first; in the main process alone.

    Attributes:
        needs: of "network" (features of generated images), "reference" (statistics of the data set), "features" (all of
            both sides) and "data" (images of the data set) what it uses.
        protocol: what its numbers depend on.
    """

    needs: frozenset[str]
    protocol: dict[str, Any]

    def __init__(self, setting: Setting) -> None: ...

    def update(self, images: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        """Take the next generated images, uint8 (B, 3, R, R), and what the network makes of them."""

    def run(self) -> Iterator[tuple[str, float]]:
        """Yield (name, value); the name carries the number of images."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class FrechetMetric:
    """Fréchet distance of the generated images to all images of the data set."""

    needs = frozenset({"network", "reference"})

    def __init__(self, setting: Setting) -> None:
        self.setting, smallest = setting, min(setting.num_images, setting.reference_count)
        dim = setting.extractor.network.feature_dim
        if smallest < 2:
            raise UserError("the FID needs at least 2 images on each side")
        if smallest <= dim:
            warnings.warn(
                f"FID of {smallest} images: fewer than {dim + 1} leave the covariance singular "
                f"and bias the distance upwards; compare it only with distances of the same number of images",
                stacklevel=3,
            )
        self.moments = ChunkedMoments(setting.num_images, dim, setting.extractor.sums_device)
        self.protocol = setting.protocol_with()

    def update(self, images: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        self.moments.update(features)

    def run(self) -> Iterator[tuple[str, float]]:
        count, reference = self.setting.num_images, self.setting.reference
        name = self.setting.name("fid")
        gaussian = FrechetReference(reference.mean, reference.covariance)
        if not self.setting.options.confidence or count < MIN_IMAGES:
            whole = self.moments.merged()
            yield name, gaussian.distance(whole.mean, whole.covariance)
            return
        found = estimate(self.moments, gaussian)
        yield from ((name, found.distance), (f"{name}_low", found.low), (f"{name}_high", found.high))
        yield f"{name}_infinite", found.infinite
        if count < FEW_IMAGES:
            warnings.warn(
                f"{name} is of {count:,} images only: of {found.distance:.4g}, about "
                f"{found.distance - found.infinite:.2g} are bias, by extrapolation to infinitely many images",
                stacklevel=2,
            )

    def state_dict(self) -> dict[str, Any]:
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.moments.load_state_dict(state)


class Stateless:
    """What a metric has besides the features that are kept for all."""

    def update(self, images: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class KernelMetric(Stateless):
    """Kernel distance: the mean over subsets, its standard error, and the spread over subsets, as others report it."""

    needs = frozenset({"network", "reference", "features"})

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.smallest = min(setting.num_images, setting.reference_count)
        self.size = setting.options.kid_subset_size or default_subset_size(self.smallest)
        if not 2 <= self.size <= self.smallest or setting.options.kid_subsets < 1:
            raise UserError(f"the KID takes 1 or more subsets of 2 to {self.smallest} images, the fewer of both sides")
        self.protocol = setting.protocol_with(subset_size=self.size, subsets=setting.options.kid_subsets)

    def run(self) -> Iterator[tuple[str, float]]:
        subsets, device = self.setting.options.kid_subsets, self.setting.extractor.sums_device
        distances = kernel_distances(*self.setting.both_sides(), self.size, subsets, device)
        name = self.setting.name("kid")
        yield name, float(distances.mean())
        yield f"{name}_error", standard_error(distances, self.size, self.smallest)
        yield f"{name}_spread", float(distances.std())


class InceptionScoreMetric:
    """Inception Score: the mean and the standard deviation over splits."""

    needs = frozenset({"network"})

    def __init__(self, setting: Setting) -> None:
        network, splits = setting.extractor.network, setting.options.is_splits
        if not setting.extractor.has_logits:
            raise UserError(f"the Inception Score needs the classes of {FIDInception.name}, not {network.name}")
        if not 1 <= splits <= setting.num_images:
            raise UserError(f"the Inception Score takes 1 to {setting.num_images} splits, the number of images")
        self.name = f"is{format_count(setting.num_images)}"
        self.score = InceptionScore(setting.num_images, network.num_classes, splits)
        rule = setting.extractor.resize_rule
        self.protocol = {"weights_hash": network.weights_hash, "resize_rule": rule, "splits": splits}

    def update(self, images: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        self.score.update(logits)

    def run(self) -> Iterator[tuple[str, float]]:
        scores = self.score.scores()
        yield self.name, scores.mean().item()
        yield f"{self.name}_spread", scores.std(correction=0).item()

    def state_dict(self) -> dict[str, Any]:
        return self.score.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.score.load_state_dict(state)


class PrdcMetric(Stateless):
    """Precision, recall, density and coverage."""

    needs = frozenset({"network", "reference", "features"})

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        if min(setting.num_images, setting.reference_count) <= DENSITY_COVERAGE_K:
            raise UserError(f"prdc needs more than {DENSITY_COVERAGE_K} images on each side")
        self.protocol = setting.protocol_with(
            precision_recall_k=PRECISION_RECALL_K, density_coverage_k=DENSITY_COVERAGE_K
        )

    def run(self) -> Iterator[tuple[str, float]]:
        device = self.setting.extractor.sums_device
        values = precision_recall_density_coverage(*self.setting.both_sides(), device)
        for name, value in values.items():
            yield f"{name}{format_count(self.setting.num_images)}", value


class SwdMetric:
    """Sliced Wasserstein distance of the first `num_images` generated images to as many random ones of the data set."""

    needs = frozenset({"data"})

    def __init__(self, setting: Setting) -> None:
        dataset = setting.dataset
        try:
            pyramid_levels(dataset.resolution)
        except ValueError as error:
            raise UserError(str(error)) from error
        count = min(setting.num_images, len(dataset), SWD_MAX_IMAGES)
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(SWD_SEED))[:count]
        self.real = dataset.take(chosen.sort().values)[0]
        self.fake = setting.saved.rows("images", count, tuple(self.real.shape[1:]), np.uint8)
        self.progress = setting.progress
        self.protocol = {"images_per_side": count, "seed": SWD_SEED, "data_fingerprint": dataset.fingerprint}

    def update(self, images: Tensor, features: Tensor | None, logits: Tensor | None) -> None:
        self.fake.update(images[: len(self.real) - self.fake.filled])

    def run(self) -> Iterator[tuple[str, float]]:
        prefix = f"swd{format_count(len(self.real))}"
        distances = sliced_wasserstein(self.real, self.fake.tensor(), seed=SWD_SEED, progress=self.progress)
        for name, value in distances.items():
            yield name.replace("swd", prefix), value

    def state_dict(self) -> dict[str, Any]:
        return self.fake.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.fake.load_state_dict(state)


METRICS: dict[str, type[Metric]] = {
    "fid": FrechetMetric,
    "kid": KernelMetric,
    "is": InceptionScoreMetric,
    "prdc": PrdcMetric,
    "swd": SwdMetric,
}


def format_count(count: int) -> str:
    """50000 -> "50k", 512 -> "512"."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)
