"""What a run measures of its averaged generator: pictures, metrics, and how diverse its samples are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from biggan import pictures, sampling
from biggan.config import TrainConfig
from biggan.data import ImageDataset
from biggan.diversity import Diversity
from biggan.generator import Generator
from biggan.metrics.evaluator import evaluate
from runtime.device import Device
from runtime.randomness import derive_seed

WATCHED_IMAGES = 64  # samples, and images of the data, whose diversity is compared


class Measurements:
    """All of it depends on the weights and the run's seed alone. Of several processes all must call each method."""

    def __init__(
        self, config: TrainConfig, dataset: ImageDataset, device: Device, generator: Generator, folder: Path
    ) -> None:
        self.config, self.dataset, self.device = config, dataset, device
        self.generator, self.folder = generator, folder
        self._diversity: Diversity | None = None

    def samples(self, count: int, seed: int) -> Iterator[torch.Tensor]:
        """Batches of uint8 images."""
        config, generator = self.config, self.generator
        z = sampling.latents(0, count, generator.dim_z, seed)
        y = sampling.class_labels(0, count, config.model.num_classes, seed)
        batch_size = config.global_batch_size // config.accumulation_steps
        return sampling.generate(generator, z, y, self.device, seed, batch_size, config.precision)

    def draw(self, kimg: float) -> torch.Tensor:
        """A grid of samples, uint8 (3, H, W), which the first process writes to `samples/`."""
        columns = self.config.log.grid
        picture = pictures.grid(torch.cat(list(self.samples(columns**2, self.config.seed))), columns)
        if self.device.processes.is_main:
            pictures.save_png(picture, self.folder / "samples" / f"kimg-{kimg:09.3f}.png")
        return picture

    def metrics(self) -> dict[str, float]:
        """The values of `--log.metrics`."""
        count = min(self.config.log.metric_images, len(self.dataset))
        return evaluate(
            self.samples(count, derive_seed("metric", self.config.seed)),
            count,
            self.dataset,
            self.config.log.metrics,
            device=self.device,
            cache_dir=self.folder,
            progress=False,
        )

    def diversity(self) -> dict[str, float]:
        """`diversity` and `diversity_nearest` of samples, as `biggan.diversity` defines them."""
        count = max(2, min(WATCHED_IMAGES, len(self.dataset)))
        if self._diversity is None:
            self._diversity = Diversity(self.dataset.batch(0, count, self.config.seed, flip=False)[0])
        samples = torch.cat(list(self.samples(count, derive_seed("diversity", self.config.seed))))
        return self._diversity(samples)
