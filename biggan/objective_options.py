"""Which losses, penalties and augmentations go together, and with what else."""

from __future__ import annotations

from dataclasses import replace

from biggan.augmentation import Augmentation
from biggan.config import AugmentConfig, LossConfig, TrainConfig
from runtime.errors import UserError


def check(config: TrainConfig) -> None:
    """Raises UserError for values that cannot be, and for options that contradict each other or do nothing."""
    _check_loss(config.loss)
    _check_augmentation(config.augment)
    if needs_second_derivatives(config):
        if config.compile:
            raise UserError(
                "--loss.r1 and --loss.r2 need second derivatives, which torch.compile has not: no --compile."
            )
        backend = config.attention.options.get("backend", "auto")
        if config.attention.name == "smyrf" and backend not in ("auto", "einsum"):
            raise UserError(
                f"--attention.backend {backend} lacks second derivatives, which --loss.r1 and r2 need: use einsum."
            )


def _check_loss(loss: LossConfig) -> None:
    strengths = ("r1", "r2", "consistency_real", "consistency_fake", "lecam", "lecam_start_step")
    if negative := [name for name in strengths if getattr(loss, name) < 0]:
        raise UserError(f"--loss.{negative[0].replace('_', '-')} must not be below 0.")
    if not 0 <= loss.lecam_decay < 1:
        raise UserError("--loss.lecam-decay must be at least 0 and below 1.")
    if loss.lecam_start_step and not loss.lecam:
        raise UserError("--loss.lecam-start-step does nothing without --loss.lecam, the strength.")


def _check_augmentation(augment: AugmentConfig) -> None:
    try:
        Augmentation(augment.policy)
    except ValueError as error:
        raise UserError(f"--augment.policy: {error}.") from None
    if not 0 < augment.probability <= 1:
        raise UserError("--augment.probability must be above 0 and at most 1.")
    if not 0 <= augment.target < 1:
        raise UserError("--augment.target must be at least 0 and below 1; 0.6 is usual.")
    if not augment.kimg > 0:
        raise UserError("--augment.kimg must be above 0.")
    if not augment.policy and (augment.target or augment.probability < 1):
        raise UserError("--augment.target and --augment.probability do nothing without --augment.policy.")
    if "rotation" in augment.policy and augment.probability == 1 and not augment.target:
        raise UserError(
            "--augment.policy rotation at probability 1 hides which way is up, and the generator turns its images too: "
            "give --augment.target 0.6 or an --augment.probability below 0.8."
        )


def needs_second_derivatives(config: TrainConfig) -> bool:
    """Whether a step differentiates a gradient of the discriminator."""
    return bool(config.loss.r1 or config.loss.r2)


def with_second_derivatives(config: TrainConfig) -> TrainConfig:
    """The configuration for a network that is differentiated twice, where that is asked for."""
    if config.attention.name != "smyrf" or not needs_second_derivatives(config):
        return config
    options = config.attention.options | {"backend": "einsum"}
    return replace(config, attention=replace(config.attention, options=options))
