"""The state of a training run: how it starts, resumes, is saved, goes back, and which batch each step takes.

All randomness of step n comes from (seed, n), and the data order is a function of the number of images seen, so a
resumed run is the uninterrupted one, and several processes, each of which takes its rows of every batch, are one. A run
whose numbers are not finite goes back to its newest checkpoint, and on from there with another seed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from biggan import checkpoints
from biggan.config import TrainConfig
from biggan.data import ImageDataset
from biggan.divergence import non_finite_weights, spectral_norms
from biggan.ema import ema_decay
from biggan.gan import Gan, images_per_step, initial_weights
from biggan.run_setup import refuse_other_run
from biggan.watch import Watch
from runtime.checkpoint import BackgroundSaver, CheckpointFolder
from runtime.config import to_dict
from runtime.device import Device
from runtime.divergence import Diverged, GoesBack
from runtime.randomness import derive_seed, host_generator
from runtime.run_folder import require_keys
from runtime.run_log import RunningMeans


class RunState(GoesBack):
    """One run in its directory, at some step."""

    advice = "Try lower learning rates or another --seed."

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: Device, folder: Path):
        self.config, self.dataset, self.device, self.folder = config, dataset, device, folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints", checkpoints.KIND, config.log.keep_checkpoints)
        device.seed(derive_seed("weights", config.seed))
        self.gan = Gan(config, device)
        self.processes = device.processes
        self.saver = BackgroundSaver(self.checkpoints, self.processes.is_main, self._copy_finite)
        self._begin()

    def _begin(self) -> None:
        """What a run counts, as it is before the first step."""
        self.step, self.elapsed_sec, self.guarded_from = 0, 0.0, 0
        self.restarts, self.seed = 0, self.config.seed
        self.means = RunningMeans(self.gan.step_values, self.device.put)
        self.watch = Watch(self.config.guard, self.config.guard.best_metric or next(iter(self.config.log.metrics), ""))

    def start(self) -> None:
        """Puts a run to its first step: with the weights of its seed, or with those that it is told to start from."""
        self._begin()
        if self.config.initial_weights:
            path = self.config.initial_weights
            self.gan.load_state_dict(self.processes.from_main(lambda: checkpoints.read(path)[1]))
        else:
            self.device.seed(derive_seed("weights", self.config.seed))
            self.gan.load_state_dict(initial_weights(self.config))

    def resume(self) -> Path | None:
        """Continues from the newest whole checkpoint, if there is one.

        Raises:
            UserError: the folder belongs to a run with another configuration or other data.
        """
        newest = self.processes.from_main(self.checkpoints.load_newest)  # the others may not see its disk
        if newest is None:
            return None
        path, tree = newest
        require_keys(path, tree, ("config", "step", "progress", "rng", "data"))
        refuse_other_run(tree["config"], tree["data"], to_dict(self.config), self.dataset)
        self.gan.load_state_dict(tree)
        progress = tree["progress"]
        self.step, self.elapsed_sec = tree["step"], progress["elapsed_sec"]
        self.guarded_from = self.step
        self.means.load_state_dict(progress["means"])
        self._count_restarts(progress.get("restarts", 0))
        if "watch" in progress:
            self.watch.load_state_dict(progress["watch"])
        self.device.set_rng_state(tree["rng"])
        return path

    def save(self, name: str | None = None) -> None:
        """Starts a save of this step, under a `name` of its own where one is given; `self.saver.wait()` ends it.

        Raises:
            Diverged: numbers are not finite; nothing is saved.
        """
        self.refuse_divergence(self.gan.guard.reader())
        progress = {
            "elapsed_sec": self.elapsed_sec,
            "means": self.means.state_dict(),
            "restarts": self.restarts,
            "watch": self.watch.state_dict(),
        }
        tree = {
            "config": to_dict(self.config),
            **self.gan.state_dict(),
            "step": self.step,
            "progress": progress,
            "rng": self.device.rng_state(),
            "data": {
                "position": self.step * images_per_step(self.config),
                "count": len(self.dataset),
                "fingerprint": self.dataset.fingerprint,
            },
        }
        if name:
            self.saver.save_as(name, tree)
        else:
            self.saver.save(self.step, tree)

    def _copy_finite(self, tree: dict[str, Any]) -> dict[str, Any]:
        tree = self.device.to_host(tree)
        if bad := non_finite_weights(tree):
            raise Diverged(self.step, bad)
        return tree

    def batch(self, step: int) -> list[torch.Tensor]:
        """The arguments of `train_step`, on the device: a function of (seed, restarts, step).

        Every process draws the noise of the whole batch, which is little, and keeps and reads only its own rows.
        """
        config = self.config
        s, a = config.d_steps_per_g_step, config.accumulation_steps
        b = config.global_batch_size // a
        rows = self.device.local_rows(b)
        parts = torch.arange(step * s * a, (step + 1) * s * a)
        positions = (parts[:, None] * b + rows).flatten().numpy()  # (S * A * rows,)
        images, labels = self.dataset.samples(positions, self.seed, config.horizontal_flip)
        if config.model.num_classes == 1:
            labels = torch.zeros_like(labels)
        generator = host_generator("noise", self.seed, step)
        z = torch.randn((s + 1) * a, b, self.gan.generator.dim_z, generator=generator)
        y = torch.randint(config.model.num_classes, ((s + 1) * a, b), generator=generator)
        rate = torch.tensor([1 - ema_decay(config.ema, step + 1)])
        dealt = [images.unflatten(0, (s * a, -1)), labels.unflatten(0, (s * a, -1)), z[:, rows], y[:, rows]]
        if numbers := self.gan.objective.numbers:
            augment = host_generator("augment", self.seed, step)  # a stream of its own: the rest stays what it is
            dealt.append(torch.rand((s + 1) * a, b, 2, numbers, generator=augment)[:, rows])
        whole = [rate, *self.gan.draw_projections(generator)]
        return [self.device.put(x, batch_dim=1, local=True) for x in dealt] + [self.device.put(x) for x in whole]

    def spectral_norms(self) -> dict[str, float]:
        networks = {name: getattr(self.gan, name).state_dict() for name in ("generator", "discriminator")}
        return spectral_norms(self.device.to_host(networks))
