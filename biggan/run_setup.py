"""What a run needs before its first step: its images, and a configuration that fits them and the run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from biggan import objective_options
from biggan.config import TrainConfig
from biggan.data import ImageDataset, drawn_faces, open_images
from runtime import run_folder
from runtime.config import to_dict
from runtime.errors import UserError

# What may differ between a run and its continuation: no weight depends on these.
MAY_CHANGE = {
    *("total_kimg", "log", "device", "compile", "out", "data", "preset", "initial_weights"),
    *("checkpoint_activations", "compilation_cache", "debug", "guard", "shard_parameters", "channels_last"),
}
WHY_NOT = {
    "global_batch_size": "the length of a step and the data order follow from it; another number of processes needs "
    "no other one",
    "accumulation_steps": "batch norm sees the images of a part together",
    "d_steps_per_g_step": "the data order follows from it",
    "precision": "its rounding is part of the run",
    "seed": "all noise and the data order follow from it",
}
PART_OF = dict.fromkeys(("precision", "recall", "density", "coverage"), "prdc")  # values that one metric gives
FOLDERS = ("samples", "checkpoints", "tensorboard")


def open_dataset(config: TrainConfig, cache_dir: Path | None = None) -> ImageDataset:
    """Raises UserError where there is no data at `config.data`."""
    if not config.data:
        raise UserError(
            f"preset '{config.preset}' needs images: give --data PATH (a folder or an archive: docs/data.md)."
        )
    if config.data == "drawn-faces":
        return drawn_faces(config.model.resolution, config.drawn_faces)
    conditional = config.model.num_classes != 1
    return open_images(config.data, config.model.resolution, cache_dir=cache_dir, labels=conditional)


def fit_to_data(config: TrainConfig, dataset: ImageDataset, num_shards: int = 1) -> TrainConfig:
    """Fills in what depends on the data (the number of classes) and checks what only the whole shows.

    `num_shards` is the number of devices that a batch is dealt over.

    Raises:
        UserError: fields that contradict each other or the data.
    """
    batch, parts = config.global_batch_size, config.accumulation_steps
    if min(batch, parts) < 1 or batch % parts:
        raise UserError(f"--global-batch-size {batch} must be a positive multiple of --accumulation-steps {parts}.")
    if config.d_steps_per_g_step < 1:
        raise UserError("--d-steps-per-g-step must be at least 1.")
    if not config.total_kimg > 0 or not config.log.kimg_per_tick > 0:
        raise UserError("--total-kimg and --log.kimg-per-tick must be above 0.")
    for name in ("checkpoint_every_ticks", "keep_checkpoints", "grid"):
        if getattr(config.log, name) < 1:
            raise UserError(f"--log.{name.replace('_', '-')} must be at least 1.")
    guard, measured = config.guard, config.log.metrics if config.log.metric_every_ticks else ()
    if guard.best_metric and not {guard.best_metric, PART_OF.get(guard.best_metric)} & set(measured):
        raise UserError(
            f"--guard.best-metric {guard.best_metric} is not measured: it needs --log.metric-every-ticks, and a place "
            "in --log.metrics."
        )
    if guard.patience < 1 or guard.max_restarts < 0:
        raise UserError("--guard.patience must be at least 1, --guard.max-restarts not below 0.")
    objective_options.check(config)
    if batch // parts % num_shards:
        raise UserError(
            f"--global-batch-size {batch} / --accumulation-steps {parts} must be a multiple of the {num_shards} devices"
        )
    classes = config.model.num_classes or dataset.num_classes
    if 1 < classes < dataset.num_classes:
        raise UserError(f"--model.num-classes is {classes}, but {dataset.source} has {dataset.num_classes} classes.")
    return replace(config, model=replace(config.model, num_classes=classes))


def make_folders(folder: Path) -> None:
    """Raises UserError where the run directory cannot be written."""
    run_folder.make_folders(folder, FOLDERS)


def refuse_other_run(before: dict[str, Any], data: dict[str, Any], now: dict[str, Any], dataset: ImageDataset) -> None:
    """Compares a checkpoint's configuration and data with those at hand.

    Raises:
        UserError: continuing would not be the same run.
    """
    before = to_dict(TrainConfig()) | before  # an option that is newer than the checkpoint is off in it
    data_now = {"count": len(dataset), "fingerprint": dataset.fingerprint}
    run_folder.refuse_other_run(before, now, data, data_now, MAY_CHANGE, "images", WHY_NOT)
