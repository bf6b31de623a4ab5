"""Named configurations. Each function's docstring is a claim: command, hardware, time and result, or "not run"."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from biggan.config import AttentionConfig, EmaConfig, LogConfig, ModelConfig, OptimizerConfig, TrainConfig
from runtime.errors import UserError


def smyrf(
    num_hashes: int,
    q_cluster_size: int,
    k_cluster_size: int,
    generator: tuple[int, ...],
    discriminator: tuple[int, ...],
) -> AttentionConfig:
    """SMYRF attention behind the blocks of these resolutions; a larger cluster than the map is the whole map."""
    options = {"num_hashes": num_hashes, "q_cluster_size": q_cluster_size, "k_cluster_size": k_cluster_size}
    return AttentionConfig("smyrf", generator, discriminator, options)


def demo() -> TrainConfig:
    """Drawn faces at 32 pixels, SMYRF attention at 16: a whole run in minutes, without a download.

    biggan train --preset demo

    Two cores of an AMD EPYC: five to six minutes of training; a grid in which hair, skin, eyes or glasses, mouths and
    shirts of 64 different faces can be told apart.
    """
    return TrainConfig(
        preset="demo",
        data="drawn-faces",
        total_kimg=28,
        global_batch_size=16,
        model=ModelConfig(resolution=32, generator_channels=8, discriminator_channels=8, dim_z=64),
        attention=smyrf(2, 64, 16, (16,), (16,)),
        optimizer=OptimizerConfig(generator_lr=2e-4, discriminator_lr=5e-4),
        ema=EmaConfig(decay=0.995),
        log=LogConfig(kimg_per_tick=2, sample_every_ticks=5, checkpoint_every_ticks=5),
    )


def faces64() -> TrainConfig:
    """Your photographs at 64 pixels, SMYRF attention at 32, small enough for a CPU.

    biggan train --preset faces64 --data faces128.zip

    Two cores of an AMD EPYC, shared with other work: 27,000 images in 31 minutes (70 s a thousand). On 11,276
    photographs of faces the SWD of 1,000 images fell from 72.3 at 5,000 images to 54.6, 40.5, 38.6 and 37.4 at 25,000;
    faces with hair, eyes, mouths and varied light, still blurred. The whole 1,000 kimg: not run.
    """
    return TrainConfig(
        preset="faces64",
        data="",
        total_kimg=1000,
        global_batch_size=16,
        model=ModelConfig(resolution=64, generator_channels=8, discriminator_channels=24, dim_z=120),
        attention=smyrf(4, 256, 64, (32,), (32,)),
        optimizer=OptimizerConfig(generator_lr=2e-4, discriminator_lr=5e-4),
        ema=EmaConfig(decay=0.998),
        log=LogConfig(kimg_per_tick=1, sample_every_ticks=5, checkpoint_every_ticks=5, metric_every_ticks=5),
    )


def celebahq128_dense() -> TrainConfig:
    """CelebA-HQ at 128 pixels, dense attention at 64: the baseline of the SMYRF paper's comparison.

    biggan train --preset celebahq128-dense --data CelebA-HQ-img/

    Hyper-parameters of the original: 120,000 iterations of 2 discriminator steps, batch 32 (4 a core on 8 cores).
    The original kept no averaged generator; here there is one, from step 20,000. Not run.
    """
    return TrainConfig(
        preset="celebahq128-dense",
        data="",
        total_kimg=7680,
        global_batch_size=32,
        d_steps_per_g_step=2,
        model=ModelConfig(resolution=128, generator_channels=96, discriminator_channels=96, dim_z=120),
        attention=AttentionConfig("dense", (64,), (64,)),
        optimizer=OptimizerConfig(generator_lr=5e-5, discriminator_lr=2e-4),
        ema=EmaConfig(decay=0.9999, start_step=20000),
    )


def celebahq128_smyrf() -> TrainConfig:
    """The same with SMYRF attention at 128 in the generator and at 64 in the discriminator.

    biggan train --preset celebahq128-smyrf --data CelebA-HQ-img/

    The original's configuration named 128 for the discriminator too, a size that does not occur there, so that its
    discriminator had no attention at all. Not run.
    """
    return replace(celebahq128_dense(), preset="celebahq128-smyrf", attention=smyrf(4, 2048, 512, (128,), (64,)))


def celebahq256_smyrf() -> TrainConfig:
    """CelebA-HQ at 256 pixels, SMYRF attention at 256 in the generator and at 128 in the discriminator.

    biggan train --preset celebahq256-smyrf --data CelebA-HQ-img/ --accumulation-steps 4

    Not run.
    """
    base = celebahq128_smyrf()
    return replace(
        base,
        preset="celebahq256-smyrf",
        model=replace(base.model, resolution=256),
        attention=smyrf(4, 2048, 512, (256,), (128,)),
    )


def imagenet128() -> TrainConfig:
    """ImageNet at 128 pixels with classes: shared embedding, hierarchical z, SMYRF attention at 64.

    biggan train --preset imagenet128 --data ILSVRC2012/train --precision bfloat16 --accumulation-steps 8

    Hyper-parameters of the original: batch 512, 8 hash rounds of clusters of 256 queries and 64 keys. Not run.
    """
    return TrainConfig(
        preset="imagenet128",
        data="",
        total_kimg=100000,
        global_batch_size=512,
        model=ModelConfig(
            resolution=128,
            generator_channels=96,
            discriminator_channels=96,
            dim_z=120,
            num_classes=0,
            shared_dim=128,
            hierarchical=True,
        ),
        attention=smyrf(8, 256, 64, (64,), (64,)),
        optimizer=OptimizerConfig(generator_lr=1e-4, discriminator_lr=4e-4),
        ema=EmaConfig(decay=0.9999, start_step=20000),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "demo": demo,
    "faces64": faces64,
    "celebahq128-dense": celebahq128_dense,
    "celebahq128-smyrf": celebahq128_smyrf,
    "celebahq256-smyrf": celebahq256_smyrf,
    "imagenet128": imagenet128,
}


def get_preset(name: str) -> TrainConfig:
    """Raises UserError that lists the presets where there is none of this name."""
    if name not in PRESETS:
        raise UserError(f"unknown preset '{name}'; presets are {', '.join(PRESETS)}.")
    return PRESETS[name]()
