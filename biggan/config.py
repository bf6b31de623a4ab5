"""The configuration of a training run. Each field is a flag of `biggan train`, as `--model.resolution` or `--seed`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from runtime.config import DebugConfig, option


@dataclass(frozen=True)
class ModelConfig:
    resolution: int = option(128, "side of the images, in pixels")
    generator_channels: int = option(64, "width of the generator; its layers have multiples of this")
    discriminator_channels: int = option(64, "width of the discriminator")
    dim_z: int = option(120, "size of the latent vector")
    num_classes: int = option(
        1, "classes that condition the networks; 1 ignores labels, 0 takes the number from the data"
    )
    shared_dim: int = option(0, "size of the class embedding that all layers share; 0 gives each layer its own")
    hierarchical: bool = option(False, "feed a part of z to every block, not only to the first layer")


@dataclass(frozen=True)
class AttentionConfig:
    name: str = option("smyrf", "mechanism, one of attention.available_attention()")
    generator_resolutions: tuple[int, ...] = option((64,), "feature map sizes with attention in the generator, or none")
    discriminator_resolutions: tuple[int, ...] = option(
        (64,), "feature map sizes with attention in the discriminator, or none"
    )
    options: dict[str, Any] = option({}, "options of the mechanism, as --attention.num-hashes 4")


@dataclass(frozen=True)
class OptimizerConfig:
    generator_lr: float = option(5e-5, "Adam's learning rate for the generator")
    discriminator_lr: float = option(2e-4, "Adam's learning rate for the discriminator")
    beta1: float = option(0.0, "Adam's decay of the first moment")
    beta2: float = option(0.999, "Adam's decay of the second moment")
    epsilon: float = option(1e-6, "Adam's epsilon")
    orthogonal_penalty: float = option(
        0.0, "strength of orthogonal regularisation of the generator's weights; 0 is off"
    )


@dataclass(frozen=True)
class LossConfig:
    name: str = option(
        "hinge", "hinge, nonsaturating, or relativistic", choices=("hinge", "nonsaturating", "relativistic")
    )
    r1: float = option(0.0, "strength of the penalty on the discriminator's gradient at real images; 0 is off")
    r2: float = option(0.0, "the same at generated images")
    consistency_real: float = option(
        0.0, "strength of the penalty on how a real image's logit changes with a flip and a shift of it; 0 is off"
    )
    consistency_fake: float = option(0.0, "the same for generated images")
    lecam: float = option(0.0, "strength of LeCam regularisation, towards the other side's mean logit; 0 is off")
    lecam_decay: float = option(0.99, "decay of these means, a discriminator step")
    lecam_start_step: int = option(0, "training steps without LeCam regularisation, while its means settle")


@dataclass(frozen=True)
class AugmentConfig:
    policy: tuple[str, ...] = option(
        (),
        "what is done to all images before the discriminator sees them, of color, translation, cutout, flip, rotation "
        "and scale, or none",
    )
    probability: float = option(1.0, "chance of each transform for each image; with a target, the most it may become")
    target: float = option(
        0.0,
        "adapt the probability, from 0, until the discriminator's logits of real images have this mean sign; 0 is off",
    )
    kimg: float = option(500.0, "thousands of real images in which an adapted probability can go from 0 to 1")


@dataclass(frozen=True)
class EmaConfig:
    decay: float = option(0.9999, "decay of the averaged generator's weights, a step")
    start_step: int = option(0, "until this step the averaged generator is a copy")
    warmup: bool = option(True, "decay at most (1 + n) / (10 + n) in the n-th step after start_step")


@dataclass(frozen=True)
class LogConfig:
    kimg_per_tick: float = option(1.0, "thousands of images between log lines")
    sample_every_ticks: int = option(10, "ticks between sample grids; 0 draws only the last")
    checkpoint_every_ticks: int = option(10, "ticks between checkpoints; one is always written at the end")
    metric_every_ticks: int = option(0, "ticks between metrics; 0 is never")
    metrics: tuple[str, ...] = option(("swd",), "metrics computed while training")
    metric_images: int = option(1000, "images that each metric uses while training")
    keep_checkpoints: int = option(3, "how many of the newest checkpoints to keep")
    grid: int = option(8, "sample grids have this many rows and columns")


@dataclass(frozen=True)
class GuardConfig:
    max_restarts: int = option(
        3, "times that a run goes back to its last checkpoint, with other noise, after a loss or gradient not finite"
    )
    on_collapse: str = option(
        "warn", "what signs of collapse do: off is nothing, stop ends the run", choices=("off", "warn", "stop")
    )
    patience: int = option(3, "ticks in a row (of those that measure it) that a sign of collapse must hold")
    min_loss_d: float = option(0.05, "a discriminator loss below this is a sign of collapse")
    min_diversity: float = option(0.5, "sample diversity below this share of the run's best is a sign of collapse")
    max_metric_factor: float = option(1.5, "a best_metric this many times worse than the run's best is such a sign")
    best_metric: str = option(
        "",
        "metric that chooses checkpoints/best.pt; empty is the first of --log.metrics",
        choices=("", "fid", "kid", "swd", "is", "precision", "recall", "density", "coverage"),
    )


@dataclass(frozen=True)
class TrainConfig:
    preset: str = option("", "the preset that this run started from")
    data: str = option(
        "drawn-faces", "images: a folder, zip, tar, HDF5, LMDB, Parquet or packed file (docs/data.md), or 'drawn-faces'"
    )
    out: str = option("", "run directory; empty is runs/PRESET")
    initial_weights: str = option("", "checkpoint whose weights a new run starts from, as tools.convert_biggan writes")
    device: str = option("auto", "auto, cpu, cuda or xla", choices=("auto", "cpu", "cuda", "xla"))
    seed: int = option(0, "seed of the initial weights, the data order and all noise")
    total_kimg: float = option(1000.0, "length of the run: thousands of real images shown to the discriminator")
    global_batch_size: int = option(64, "images in a discriminator or generator step, over all accumulation steps")
    accumulation_steps: int = option(1, "parts that a batch is computed in, to save memory")
    d_steps_per_g_step: int = option(1, "discriminator steps for each generator step")
    horizontal_flip: bool = option(True, "mirror half of the real images")
    precision: str = option("float32", "float32, or bfloat16 for mixed precision", choices=("float32", "bfloat16"))
    channels_last: bool = option(True, "keep images and weights in channels-last memory order")
    compile: bool = option(False, "compile both networks with torch.compile")
    compilation_cache: str = option(
        "", "where xla keeps compiled programs; empty is the run directory, none is nowhere"
    )
    checkpoint_activations: str = option(
        "none",
        "what is computed again in the backward pass instead of kept: none, attention, or blocks (attention included)",
        choices=("none", "attention", "blocks"),
    )
    shard_parameters: bool = option(
        False, "on xla, keep on each device only a part of every matrix and of its optimizer state"
    )
    drawn_faces: int = option(10000, "how many faces 'drawn-faces' has")
    model: ModelConfig = field(default_factory=ModelConfig)
    attention: AttentionConfig = field(default_factory=AttentionConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    log: LogConfig = field(default_factory=LogConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    debug: DebugConfig = field(default_factory=DebugConfig)
