"""A training run: feeds steps, writes ticks, samples, metrics and checkpoints, and resumes by itself.

A run directory holds `config.json`, `stats.jsonl`, `samples/`, `checkpoints/` and `tensorboard/`. All randomness of
step n comes from (seed, n), and the data order is a function of the number of images seen, so a resumed run is the
uninterrupted one, and several processes, each of which takes its rows of every batch, are one. The first of them writes
the run directory.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from biggan import checkpoints, pictures, sampling
from biggan.config import TrainConfig
from biggan.data import ImageDataset
from biggan.ema import ema_decay
from biggan.gan import Gan, images_per_step, steps_for
from biggan.metrics.evaluator import evaluate
from biggan.run_setup import fit_to_data, make_folders, open_dataset, refuse_other_run
from runtime.checkpoint import BackgroundSaver, CheckpointFolder, write_atomically
from runtime.config import to_dict
from runtime.device import Device, open_device
from runtime.errors import RunError, UserError
from runtime.preemption import StopRequest
from runtime.randomness import derive_seed, host_generator
from runtime.run_log import Progress, RunLog, RunningMeans

PROFILED_STEPS = range(10, 13)  # counted from where the run starts or resumes: after all compilation


class Run:
    """One run in its directory."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: Device, folder: Path):
        self.config, self.dataset, self.device, self.folder = config, dataset, device, folder
        self.checkpoints = CheckpointFolder(folder / "checkpoints", checkpoints.KIND, config.log.keep_checkpoints)
        device.seed(derive_seed("weights", config.seed))
        self.gan = Gan(config, device)
        self.step = 0
        self.elapsed_sec = 0.0
        self.processes = device.processes
        self.saver = BackgroundSaver(self.checkpoints, self.processes.is_main, device.to_host)
        self.means = RunningMeans(Gan.STEP_VALUES, device.put)

    def resume(self) -> Path | None:
        """Continues from the newest whole checkpoint, if there is one.

        Raises:
            UserError: the folder belongs to a run with another configuration or other data.
        """
        newest = self.processes.from_main(self.checkpoints.load_newest)  # the others may not see its disk
        if newest is None:
            return None
        path, tree = newest
        refuse_other_run(tree["config"], tree["data"], to_dict(self.config), self.dataset)
        self.gan.load_state_dict(tree)
        self.step, self.elapsed_sec = tree["step"], tree["progress"]["elapsed_sec"]
        self.means.load_state_dict(tree["progress"]["means"])
        self.device.set_rng_state(tree["rng"])
        return path

    def save(self) -> None:
        """Starts a save; `self.saver.wait()` ends it."""
        self.saver.save(
            self.step,
            {
                "config": to_dict(self.config),
                **self.gan.state_dict(),
                "step": self.step,
                "progress": {"elapsed_sec": self.elapsed_sec, "means": self.means.state_dict()},
                "rng": self.device.rng_state(),
                "data": {
                    "position": self.step * images_per_step(self.config),
                    "count": len(self.dataset),
                    "fingerprint": self.dataset.fingerprint,
                },
            },
        )

    def batch(self, step: int) -> list[torch.Tensor]:
        """The arguments of `train_step`, on the device: a function of (seed, step).

        Every process draws the noise of the whole batch, which is little, and keeps and reads only its own rows.
        """
        config = self.config
        s, a = config.d_steps_per_g_step, config.accumulation_steps
        b = config.global_batch_size // a
        rows = self.device.local_rows(b)
        parts = torch.arange(step * s * a, (step + 1) * s * a)
        positions = (parts[:, None] * b + rows).flatten().numpy()  # (S * A * rows,)
        images, labels = self.dataset.samples(positions, config.seed, config.horizontal_flip)
        if config.model.num_classes == 1:
            labels = torch.zeros_like(labels)
        generator = host_generator("noise", config.seed, step)
        z = torch.randn((s + 1) * a, b, self.gan.generator.dim_z, generator=generator)
        y = torch.randint(config.model.num_classes, ((s + 1) * a, b), generator=generator)
        rate = torch.tensor([1 - ema_decay(config.ema, step + 1)])
        dealt = [images.unflatten(0, (s * a, -1)), labels.unflatten(0, (s * a, -1)), z[:, rows], y[:, rows]]
        whole = [rate, *self.gan.draw_projections(generator)]
        return [self.device.put(x, batch_dim=1, local=True) for x in dealt] + [self.device.put(x) for x in whole]

    def train_step(self, images: torch.Tensor, labels: torch.Tensor, z: torch.Tensor, y: torch.Tensor, *rest) -> None:
        """One `Gan.step`, whose values go to `means`.

        Its S x A parts come as one dimension: XLA deals tensors of at most five dimensions over a mesh.
        """
        dealt = [x.unflatten(0, (-1, self.config.accumulation_steps)) for x in (images, labels, z, y)]
        self.means.add(self.gan.step(*dealt, *rest))

    def train(self, stop: StopRequest) -> None:
        """Trains to `total_kimg` or until a process is asked to stop; a checkpoint is there in both cases."""
        config, log_config = self.config, self.config.log
        total_steps, steps_per_tick = steps_for(config, config.total_kimg), steps_for(config, log_config.kimg_per_tick)
        kimg_per_step = images_per_step(config) / 1000
        is_main = self.processes.is_main
        log = RunLog(self.folder, self.step, writes=is_main)
        progress = Progress(total_steps * kimg_per_step, self.step * kimg_per_step, "kimg", shows=is_main)
        step_function = self.device.compile_step(self.train_step)
        tick_start, tick_step, saved_step = time.monotonic(), self.step, None
        unread = None  # writes the tick whose means the device is still computing
        first_step, profile = self.step, contextlib.ExitStack()
        while self.step < total_steps and not self.processes.any(stop.requested):
            if config.debug.profile and self.step == first_step + PROFILED_STEPS.start:
                profile.enter_context(self.device.profile(self.folder / "tensorboard"))
            self.device.seed(derive_seed("step", config.seed, self.step))
            step_function(*self.batch(self.step))
            self.step += 1
            progress.advance(kimg_per_step)
            if self.step == first_step + PROFILED_STEPS.stop:
                profile.close()
            if unread:  # now that the device has the next step to do
                unread = unread()
            if self.step % steps_per_tick and self.step < total_steps:
                continue
            now = time.monotonic()
            self.elapsed_sec += now - tick_start
            sec_per_kimg = (now - tick_start) / ((self.step - tick_step) * kimg_per_step)
            tick, last = math.ceil(self.step / steps_per_tick), self.step == total_steps
            measure = log_config.metric_every_ticks and (last or tick % log_config.metric_every_ticks == 0)
            draw = last or log_config.sample_every_ticks and tick % log_config.sample_every_ticks == 0
            save = last or tick % log_config.checkpoint_every_ticks == 0
            unread = self._tick_writer(log, progress, tick, sec_per_kimg)
            if measure or draw or save:  # these wait for the device in any case
                unread = unread(self._metrics if measure else dict)
            if draw:
                log.image(self.step, "samples", self._draw_samples())
            if save:
                self.save()
                saved_step = self.step
            tick_start, tick_step = time.monotonic(), self.step
        profile.close()
        if unread:
            unread()
        if saved_step != self.step < total_steps:
            self.elapsed_sec += time.monotonic() - tick_start
            self.save()
        self.processes.from_main(self.saver.wait)
        progress.close()
        log.close()

    def _tick_writer(self, log: RunLog, progress: Progress, tick: int, sec_per_kimg: float) -> Callable[..., None]:
        """A function that waits for the means of the tick that ends now and writes them, and what its argument returns.

        Raises:
            RunError: from that function, where a mean is not finite.
        """
        step, read, described = self.step, self.means.take(), self._describe_tick(tick, sec_per_kimg)

        def write(further: Callable[[], dict[str, float]] = dict) -> None:
            means = read()
            self._refuse_non_finite(means, step)
            values = described | means | further()
            log.write(step, values)
            progress.tick(_tick_text(values))
            if self.config.debug.xla_metrics:
                progress.message("  ".join(f"{name} {count}" for name, count in self.device.counters().items()))

        return write

    def _describe_tick(self, tick: int, sec_per_kimg: float) -> dict[str, Any]:
        optimizer = self.config.optimizer
        return {
            "tick": tick,
            "kimg": self.step * images_per_step(self.config) / 1000,
            "sec_per_kimg": sec_per_kimg,
            "elapsed_sec": self.elapsed_sec,
            "lr_g": optimizer.generator_lr,
            "lr_d": optimizer.discriminator_lr,
            "peak_memory_gib": self.device.peak_memory_gib(),
        }

    def _refuse_non_finite(self, values: dict[str, float], step: int) -> None:
        bad = [name for name, value in values.items() if not math.isfinite(value)]
        if bad:
            self.saver.wait()
            paths = self.checkpoints.paths()
            kept = f"the newest checkpoint is {paths[-1]}" if paths else "no checkpoint was written yet"
            raise RunError(
                f"{', '.join(bad)} became infinite or NaN before step {step}; {kept}. "
                "Try lower learning rates or another --seed."
            )

    def samples(self, count: int, seed: Any):
        """Batches of uint8 images of the averaged generator."""
        config, generator = self.config, self.gan.ema_generator
        z = sampling.latents(0, count, generator.dim_z, seed)
        y = sampling.class_labels(0, count, config.model.num_classes, seed)
        batch_size = config.global_batch_size // config.accumulation_steps
        return sampling.generate(generator, z, y, self.device, seed, batch_size, config.precision)

    def _draw_samples(self) -> torch.Tensor:
        columns, kimg = self.config.log.grid, self.step * images_per_step(self.config) / 1000
        picture = pictures.grid(torch.cat(list(self.samples(columns**2, self.config.seed))), columns)
        if self.processes.is_main:
            pictures.save_png(picture, self.folder / "samples" / f"kimg-{kimg:09.3f}.png")
        return picture

    def _metrics(self) -> dict[str, float]:
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


def train(config: TrainConfig) -> Run:
    """Runs or resumes a configuration in its directory and returns the run as it stands then."""
    folder = Path(config.out or f"runs/{config.preset}")
    device = open_device(config.device)
    processes = device.processes
    processes.from_main(lambda: make_folders(folder))
    if config.compilation_cache != "none":
        device.use_cache(config.compilation_cache or folder / "compiled")
    dataset = processes.first_on_each_machine(lambda: open_dataset(config, folder))
    count = processes.from_main(lambda: len(dataset))
    if len(dataset) != count:
        raise UserError(f"process {processes.index} has {len(dataset):,} images, the first one {count:,}.")
    config = fit_to_data(config, dataset, device.num_shards)
    run = Run(config, dataset, device, folder)
    with StopRequest() as stop:
        resumed = run.resume()
        if not resumed and config.initial_weights:
            run.gan.load_state_dict(processes.from_main(lambda: checkpoints.read(config.initial_weights)[1]))
        if processes.is_main:
            write_atomically(
                folder / "config.json", lambda file: file.write(json.dumps(to_dict(config), indent=2).encode())
            )
        print(f"{len(dataset):,} images from {dataset.source}; {device.describe()}; run directory {folder}")
        if resumed:
            print(f"resuming from {resumed} at {run.step * images_per_step(config) / 1000:.1f} kimg")
        run.train(stop)
    return run


def _tick_text(values: dict[str, Any]) -> str:
    loss_d = values["loss_d_real"] + values["loss_d_fake"]
    metrics = "".join(f"  {name} {value:.2f}" for name, value in values.items() if name.startswith(("swd", "fid")))
    return (
        f"kimg {values['kimg']:.1f}  sec/kimg {values['sec_per_kimg']:.2f}  loss_d {loss_d:.3f}  "
        f"loss_g {values['loss_g']:.3f}{metrics}  mem {values['peak_memory_gib']:.2f} GiB"
    )
