"""A training run: feeds steps, writes ticks, samples, metrics and checkpoints, and resumes by itself.

A run directory holds `config.json`, `stats.jsonl`, `samples/`, `checkpoints/` and `tensorboard/`. Of several processes
the first writes it.
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

from biggan import checkpoints
from biggan.config import TrainConfig
from biggan.data import ImageDataset
from biggan.gan import images_per_step, steps_for
from biggan.measuring import Measurements
from biggan.run_setup import fit_to_data, make_folders, open_dataset
from biggan.run_state import RunState
from runtime.checkpoint import write_atomically
from runtime.cli import return_freed_memory
from runtime.config import to_dict
from runtime.device import Device, open_device
from runtime.errors import RunError, UserError
from runtime.preemption import StopRequest
from runtime.randomness import derive_seed
from runtime.run_folder import what_is_kept
from runtime.run_log import Progress, RunLog

PROFILED_STEPS = range(10, 13)  # counted from where the run starts or resumes: after all compilation


class Run(RunState):
    """Trains."""

    def __init__(self, config: TrainConfig, dataset: ImageDataset, device: Device, folder: Path) -> None:
        super().__init__(config, dataset, device, folder)
        self.measurements = Measurements(config, dataset, device, self.gan.ema_generator, folder)

    def train_step(self, *batch: torch.Tensor) -> None:
        """One `Gan.step` on what `batch` returns, whose values go to `means`.

        Its S x A parts come as one dimension: XLA deals tensors of at most five dimensions over a mesh.
        """
        num_dealt = 5 if self.gan.objective.numbers else 4
        images, labels, z, y, *more = (x.unflatten(0, (-1, self.config.accumulation_steps)) for x in batch[:num_dealt])
        named = {"uniforms": more[0]} if more else {}
        self.means.add(self.gan.step(images, labels, z, y, *batch[num_dealt:], **named))

    def _train(self, stop: StopRequest) -> None:
        """Trains to `total_kimg`, or until a process is asked to stop.

        Raises:
            Diverged: numbers that are not finite.
            RunError: signs of collapse, where these are to stop the run.
            OSError: a disk that is full, or images that cannot be read any more.
        """
        config, log_config = self.config, self.config.log
        total_steps, steps_per_tick = steps_for(config, config.total_kimg), steps_for(config, log_config.kimg_per_tick)
        kimg_per_step = images_per_step(config) / 1000
        is_main = self.processes.is_main
        with contextlib.ExitStack() as cleanup:
            log = cleanup.enter_context(contextlib.closing(RunLog(self.folder, self.step, writes=is_main)))
            bar = Progress(total_steps * kimg_per_step, self.step * kimg_per_step, "kimg", shows=is_main)
            progress = cleanup.enter_context(contextlib.closing(bar))
            profile = cleanup.enter_context(contextlib.ExitStack())
            step_function = self.device.compile_step(self.train_step)
            tick_start, tick_step, saved_step = time.monotonic(), self.step, None
            unread = None  # writes the tick whose means the device is still computing
            first_step = self.step
            while self.step < total_steps and not self.processes.any(stop.requested):
                if config.debug.profile and self.step == first_step + PROFILED_STEPS.start:
                    profile.enter_context(self.device.profile(self.folder / "tensorboard"))
                self.device.seed(derive_seed("step", self.seed, self.step))
                step_function(*self._read_batch())
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
                self.saver.check()
                unread = self._tick_writer(log, progress, tick, sec_per_kimg)
                if measure or draw or save:  # these wait for the device in any case
                    unread = unread(measure, draw)
                if draw:
                    log.image(self.step, "samples", self.measurements.draw(self.step * kimg_per_step))
                if measure and self.watch.is_best(self.step):
                    self.save(checkpoints.BEST)
                if save:
                    log.sync()
                    self.save()
                    saved_step = self.step
                tick_start, tick_step = time.monotonic(), self.step
            if unread:
                unread()
            if saved_step != self.step < total_steps:
                self.elapsed_sec += time.monotonic() - tick_start
                log.sync()
                self.save()
            self.processes.from_main(self.saver.wait)

    def _read_batch(self) -> list[torch.Tensor]:
        """The batch of this step. Where the images cannot be read any more, saves what has been reached.

        Raises:
            OSError: they cannot.
        """
        try:
            return self.batch(self.step)
        except OSError:
            if self.processes.count == 1:  # of several, the others wait in a step for this one
                self.save()
                self.saver.wait()
            raise

    def _tick_writer(self, log: RunLog, progress: Progress, tick: int, sec_per_kimg: float) -> Callable[..., None]:
        """A function that waits for the means of the tick that ends now and writes them, with what is measured then.

        Raises:
            Diverged: from that function, where an update was not finite.
            RunError: from it, where signs of collapse are to end the run.
        """
        step, read, described = self.step, self.means.take(), self._describe_tick(tick, sec_per_kimg)
        divergence, guard = self.gan.guard.reader(), self.config.guard

        def write(measure: bool = False, draw: bool = False) -> None:
            means = read()
            self.refuse_divergence(divergence)
            values = described | means
            if measure:
                values |= self.measurements.metrics()
            if (measure or draw) and guard.on_collapse != "off":
                values |= self.measurements.diversity()
            signs = self.watch.observe(step, values)
            if signs and guard.on_collapse != "off":
                values["warning"] = "; ".join(signs)
            log.write(step, values)
            progress.tick(_tick_text(values))
            if self.config.debug.xla_metrics:
                progress.message("  ".join(f"{name} {count}" for name, count in self.device.counters().items()))
            if signs and guard.on_collapse == "stop":
                best = f"The best was {self.checkpoints.folder / checkpoints.BEST}. " if self.watch.has_best else ""
                kept = best + what_is_kept(self.checkpoints)
                raise RunError(f"stopped for signs of collapse: {values['warning']}. {kept}")

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
            "restarts": self.restarts,
        }


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
            run.start()
        return_freed_memory()
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
    warning = f"  WARNING: {values['warning']}" if "warning" in values else ""
    return (
        f"kimg {values['kimg']:.1f}  sec/kimg {values['sec_per_kimg']:.2f}  loss_d {loss_d:.3f}  "
        f"loss_g {values['loss_g']:.3f}{metrics}  mem {values['peak_memory_gib']:.2f} GiB{warning}"
    )
