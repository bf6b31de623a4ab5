"""A training run: feeds steps, writes ticks, validations and checkpoints, tests once at the end, resumes by itself.

A run directory holds `config.json`, `stats.jsonl`, `checkpoints/`, `tensorboard/` and, once finished, `result.json`.
All randomness of step n comes from (seed, n), so a resumed run is the uninterrupted one. Several processes each take
their rows of every batch; the first of them writes the run directory.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from hrrformer.checkpoints import BEST, PRETRAINED
from hrrformer.config import TrainConfig
from hrrformer.data import TaskData
from hrrformer.evaluation import majority_baseline
from hrrformer.learner import compile_by_shape
from hrrformer.result import FILE as RESULT
from hrrformer.result import finish
from hrrformer.run_setup import fit_to_data, make_folders, open_data
from hrrformer.run_state import RunState
from runtime.checkpoint import write_atomically
from runtime.cli import return_freed_memory
from runtime.config import to_dict
from runtime.device import Device, open_device
from runtime.distributed import parts_of_batch
from runtime.preemption import StopRequest
from runtime.prefetch import prefetch
from runtime.randomness import derive_seed
from runtime.run_log import Progress, RunLog

PROFILED_STEPS = range(10, 13)  # counted from where the run starts or resumes: after all compilation
COLLAPSE_AFTER = 1 / 3  # of the steps: a validation accuracy that is the majority's by then is worth a warning


class Run(RunState):
    """Trains."""

    def __init__(self, config: TrainConfig, data: TaskData, device: Device, folder: Path) -> None:
        super().__init__(config, data, device, folder)
        self.collapse_warned = False

    def put(self, dealt: list[Tensor], whole: list[Tensor]) -> list[Tensor]:
        """Brings what `Phase.batches` yields to the device: the arguments of `train_step`."""
        return [self.device.put(x, batch_dim=1, local=True) for x in dealt] + [self.device.put(x) for x in whole]

    def train_step(self, tokens: Tensor, target: Tensor, rate: Tensor, *others: Tensor) -> None:
        """One `Learner.step`, whose values go to `means`."""
        self.means.add(self.learner.step(rate, tokens, target, *others))

    def _train(self, stop: StopRequest) -> None:
        """Goes through the phases, until the end or until a process is asked to stop; raises Diverged."""
        with contextlib.closing(RunLog(self.folder, self.step, writes=self.processes.is_main)) as log:
            for phase in self.phases:
                if phase.first <= self.step < phase.last:  # not where the phase before it was stopped
                    if self.phase is None or phase.name != self.phase.name:
                        self.enter(phase)
                    with contextlib.ExitStack() as cleanup:
                        self._train_phase(log, stop, cleanup)
            self.processes.from_main(self.saver.wait)

    def _train_phase(self, log: RunLog, stop: StopRequest, cleanup: contextlib.ExitStack) -> None:
        config, log_config, phase = self.config, self.config.log, self.phase
        epoch, is_main = phase.steps_per_epoch, self.processes.is_main
        bar = Progress(phase.num_steps / epoch, (self.step - phase.first) / epoch, "epochs", shows=is_main)
        progress = cleanup.enter_context(contextlib.closing(bar))
        step_function = compile_by_shape(self.device, self.train_step)
        tick_start, tick_step, saved_step = time.monotonic(), self.step, None
        unread = None  # writes the tick whose means the device is still computing
        first_step, profile = self.step, cleanup.enter_context(contextlib.ExitStack())
        noise_stream = self.processes.index if parts_of_batch() > 1 else 0  # one program has one noise
        batches = cleanup.enter_context(contextlib.closing(prefetch(phase.batches(self.step, self.device))))
        for batch in batches:
            if self.processes.any(stop.requested):
                break
            if config.debug.profile and self.step == first_step + PROFILED_STEPS.start:
                profile.enter_context(self.device.profile(self.folder / "tensorboard"))
            self.device.seed(derive_seed("step", self.seed, self.step, noise_stream))
            step_function(*self.put(*batch))
            self.step += 1
            progress.advance(1 / epoch)
            if self.step == first_step + PROFILED_STEPS.stop:
                profile.close()
            if unread:  # now that the device has the next step to do
                unread = unread()
            done, last = self.step - phase.first, self.step == phase.last
            if done % log_config.steps_per_tick == 0 or last:
                self.saver.check()
                now = time.monotonic()
                self.elapsed_sec += now - tick_start
                tick = math.ceil(done / log_config.steps_per_tick)
                due = log_config.validate_every_ticks and tick % log_config.validate_every_ticks == 0
                validate = phase.name == "train" and (last or due)
                save = last or tick % log_config.checkpoint_every_ticks == 0
                unread = self._tick_writer(log, progress, tick, (now - tick_start) / (self.step - tick_step))
                if validate or save:  # these wait for the device in any case
                    unread = unread(self._validate if validate else dict)
                if save:
                    log.sync()
                    self.saver.save(self.step, self.state_dict())
                    saved_step = self.step
                if last and phase.name == "pretrain":
                    self.saver.save_as(PRETRAINED, self.state_dict())
                tick_start, tick_step = time.monotonic(), self.step
        if unread:
            unread()
        if saved_step != self.step < phase.last:
            self.elapsed_sec += time.monotonic() - tick_start
            log.sync()
            self.saver.save(self.step, self.state_dict())

    def _tick_writer(self, log: RunLog, progress: Progress, tick: int, sec_per_step: float) -> Callable[..., None]:
        """A function that waits for the means of the tick that ends now and writes them, and what its argument returns.

        Raises:
            Diverged: from that function, where an update was not finite.
        """
        step, read, described = self.step, self.means.take(), self._describe_tick(tick, sec_per_step)
        divergence = self.learner.guard.reader()
        seconds_left = None if progress.terminal else (self.phase.last - step) * sec_per_step  # the bar shows its own

        def write(further: Callable[[], dict[str, float]] = dict) -> None:
            means = read()
            self.refuse_divergence(divergence)
            values = described | means | further()
            log.write(step, values)
            progress.tick(_tick_text(values, seconds_left))
            if self.config.debug.xla_metrics:
                progress.message("  ".join(f"{name} {count}" for name, count in self.device.counters().items()))

        return write

    def _describe_tick(self, tick: int, sec_per_step: float) -> dict[str, Any]:
        phase, config = self.phase, self.config
        done = self.step - phase.first
        return {
            "phase": phase.name,
            "tick": tick,
            "epoch": done / phase.steps_per_epoch,
            "examples_per_sec": config.batch_size / sec_per_step,
            "elapsed_sec": self.elapsed_sec,
            "lr": phase.rate(self.step - 1),
            "peak_memory_gib": self.device.peak_memory_gib(),
            "restarts": self.restarts,
        }

    def _validate(self) -> dict[str, float]:
        """Measures the validation split; keeps the weights if none before were better."""
        found = self.evaluator(self.data.validation, self.config.log.validation_examples)
        best = self.best
        if best is None or (found.accuracy, -found.loss) > (best["accuracy"], -best["loss"]):
            self.best = {"step": self.step, "accuracy": found.accuracy, "loss": found.loss}
            state = self.state_dict()
            state.pop("optimizer")
            self.saver.save_as(BEST, state | {"validation": self.best})
        if self.processes.is_main:
            self._warn_of_collapse(found.accuracy, found.examples)
        return {"validation_loss": found.loss, "validation_accuracy": found.accuracy}

    def _warn_of_collapse(self, accuracy: float, examples: int) -> None:
        baseline, _ = majority_baseline(self.data.validation.labels)
        noise = 2 * math.sqrt(baseline * (1 - baseline) / examples)
        share = (self.step - self.phase.first) / self.phase.num_steps
        if share < COLLAPSE_AFTER or accuracy > baseline + noise or self.collapse_warned:
            return
        self.collapse_warned = True
        warnings.warn(
            f"after {share:.0%} of the steps validation accuracy ({accuracy:.1%}) is still the majority baseline "
            f"({baseline:.1%}): nothing was learned yet. Some tasks take long to start; else try a lower "
            "--optimizer.lr, --optimizer.warmup-steps 1000 or --pretrain-epochs 5.",
            stacklevel=2,
        )


def train(config: TrainConfig) -> tuple[Run, dict[str, Any] | None]:
    """Runs or resumes a configuration in its directory: the run as it stands then, and its result if it is finished."""
    folder = Path(config.out)
    device = open_device(config.device)
    processes = device.processes
    processes.from_main(lambda: make_folders(folder))
    if config.compilation_cache != "none":
        device.use_cache(config.compilation_cache or folder / "compiled")
    data = open_data(config, processes)
    config = fit_to_data(config, data, device.num_shards)
    run = Run(config, data, device, folder)
    with StopRequest() as stop:
        resumed = run.resume()
        if not resumed and config.initial_weights:
            run.start()
        return_freed_memory()
        if processes.is_main:
            for leftover in () if resumed else (run.checkpoints.folder / BEST, folder / RESULT):
                leftover.unlink(missing_ok=True)  # of a run whose other checkpoints were thrown away
            write_atomically(
                folder / "config.json", lambda file: file.write(json.dumps(to_dict(config), indent=2).encode())
            )
        print(introduction(run))
        if resumed:
            print(f"resuming from {resumed} at step {run.step:,}")
        run.train(stop)
        if run.step < run.phases[-1].last:
            return run, None
        return run, finish(folder, run.step, data, run.evaluator, processes)


def introduction(run: Run) -> str:
    data, parameters = run.data, sum(p.numel() for p in run.classifier.parameters())
    baseline, common = majority_baseline(data.validation.labels)
    steps = " and ".join(f"{phase.num_steps:,} steps to {phase.name}" for phase in run.phases)
    return (
        f"{data.name}: {len(data.train):,} / {len(data.validation):,} / {len(data.test):,} examples to train, validate "
        f"and test, from {data.source}\n"
        f"majority baseline: {baseline:.1%} of the validation examples are of class {data.class_names[common]}\n"
        f"{parameters:,} parameters; {steps}; {run.device.describe()}; run directory {run.folder}"
    )


def _tick_text(values: dict[str, Any], seconds_left: float | None) -> str:
    minutes, seconds = divmod(round(seconds_left or 0), 60)
    left = "" if seconds_left is None else f"  left {minutes // 60}:{minutes % 60:02}:{seconds:02}"
    validation = f"  validation {values['validation_accuracy']:.1%}" if "validation_accuracy" in values else ""
    return (
        f"{values['phase']}  epoch {values['epoch']:.2f}  loss {values['loss']:.3f}  accuracy {values['accuracy']:.1%}"
        f"{validation}  examples/s {values['examples_per_sec']:,.0f}  mem {values['peak_memory_gib']:.2f} GiB{left}"
    )
