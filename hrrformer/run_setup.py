"""What a run needs before its first step: its data, and a configuration that fits them and the run directory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from hrrformer.config import TrainConfig
from hrrformer.data import TaskData, open_task
from runtime import run_folder
from runtime.config import to_dict
from runtime.distributed import Processes
from runtime.errors import UserError

# What may differ between a run and its continuation: no weight depends on these.
MAY_CHANGE = {
    *("log", "guard", "device", "compile", "out", "data", "preset", "initial_weights", "compilation_cache", "debug"),
    "accumulation_steps",
}
WHY_NOT = {
    "batch_size": "the batches of an epoch follow from it; another number of processes needs no other one",
    "length_buckets": "the batches of an epoch follow from them",
    "precision": "its rounding is part of the run",
    "seed": "all noise and the batches follow from it",
}
LENGTH = {"epochs", "max_steps"}  # as little, but for the cosine schedule
FOLDERS = ("checkpoints", "tensorboard")


def open_data(config: TrainConfig, processes: Processes | None = None) -> TaskData:
    """The task's data; of several processes, one of each machine reads the files and the others find them packed.

    Raises:
        UserError: the files are missing or wrong, or not the same for all processes.
    """
    processes = processes or Processes()
    data = processes.first_on_each_machine(lambda: open_task(config.task, config.data, config.model.max_length))
    if data.train.fingerprint != processes.from_main(lambda: data.train.fingerprint):
        raise UserError(f"process {processes.index} has other data than the first one: {data.source}.")
    return data


def fit_to_data(config: TrainConfig, data: TaskData, num_shards: int = 1) -> TrainConfig:
    """Fills in what depends on the data (vocabulary, length, classes) and checks what only the whole shows.

    `num_shards` is the number of devices that a batch is dealt over.

    Raises:
        UserError: fields that contradict each other or the data.
    """
    _check(config, num_shards)
    model = config.model
    sizes = {"vocab_size": (data.vocab_size, "token ids"), "num_outputs": (data.num_classes, "classes")}
    for name, (needed, what) in sizes.items():
        if 0 < getattr(model, name) < needed:
            flag = f"--model.{name.replace('_', '-')}"
            raise UserError(f"{flag} is {getattr(model, name)}, but {data.source} has {needed} {what} (0 takes them).")
    if model.dual_input != (data.train.inputs == 2):
        raise UserError(f"--model.dual-input is {model.dual_input}, but {data.name} has {data.train.inputs} inputs.")
    return replace(
        config,
        model=replace(
            model,
            vocab_size=model.vocab_size or data.vocab_size,
            num_outputs=model.num_outputs or data.num_classes,
            max_length=data.max_length,
        ),
    )


def _check(config: TrainConfig, num_shards: int) -> None:
    batch, parts = config.batch_size, config.accumulation_steps
    if min(batch, parts) < 1 or batch % parts:
        raise UserError(f"--batch-size {batch} must be a positive multiple of --accumulation-steps {parts}.")
    if batch // parts % num_shards:
        raise UserError(
            f"--batch-size {batch} / --accumulation-steps {parts} must be a multiple of the {num_shards} devices."
        )
    padding_counts = (
        not config.model.use_mask
        or config.model.pooling == "mean"
        or config.attention.options.get("mask_superposition") is False
    )
    if config.length_buckets and padding_counts:
        raise UserError(
            "with --length-buckets the amount of padding varies, and this network's results would with it: use "
            "--model.use-mask true, --model.pooling masked-mean or cls and no --attention.mask-superposition false, "
            "or --length-buckets none."
        )
    if not config.epochs > 0 or config.pretrain_epochs < 0 or config.max_steps < 0:
        raise UserError("--epochs must be above 0, --pretrain-epochs and --max-steps not below.")
    if not 0 < config.pretrain_mask_rate < 1:
        raise UserError("--pretrain-mask-rate must lie between 0 and 1.")
    if not 0 <= config.label_smoothing < 1:
        raise UserError("--label-smoothing must be at least 0 and below 1.")
    least = {
        "log": {"steps_per_tick": 1, "checkpoint_every_ticks": 1, "keep_checkpoints": 1, "validation_examples": 0},
        "optimizer": {"lr": 0, "min_lr": 0, "warmup_steps": 0, "clip_grad_norm": 0},
        "guard": {"max_restarts": 0},
    }
    for group, fields in least.items():
        for name, bound in fields.items():
            if not getattr(getattr(config, group), name) >= bound:
                raise UserError(f"--{group}.{name.replace('_', '-')} must be at least {bound}.")


def make_folders(folder: Path) -> None:
    """Raises UserError where the run directory cannot be written."""
    run_folder.make_folders(folder, FOLDERS)


def describe_data(data: TaskData) -> dict[str, Any]:
    """What identifies the training data in a checkpoint."""
    return {"count": len(data.train), "fingerprint": data.train.fingerprint}


def refuse_other_run(tree: dict[str, Any], config: TrainConfig, data: TaskData) -> None:
    """Compares a checkpoint's configuration and data with those at hand.

    Raises:
        UserError: continuing would not be the same run.
    """
    before = tree["config"]["task"]
    if before != config.task:
        raise UserError(f"the run directory holds a run of the task {before}, not of {config.task}. Use another --out.")
    may_change = MAY_CHANGE if config.optimizer.schedule == "cosine" else MAY_CHANGE | LENGTH
    run_folder.refuse_other_run(
        tree["config"], to_dict(config), tree["data"], describe_data(data), may_change, "examples", WHY_NOT
    )
