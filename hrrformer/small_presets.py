"""Configurations for one CPU core: presets `small` of ListOps and Text (half an hour), Image (an hour and a half).

One layer at the task's full length, as in the presets `single`, but narrow, without dropout and with a larger learning
rate that falls as a cosine over few epochs. Positions are learned, but not in Image, where they would be half of the
network and learn the training pictures by heart.
"""

from __future__ import annotations

from dataclasses import replace

from hrrformer.config import LogConfig, ModelConfig, OptimizerConfig, TrainConfig


def listops() -> TrainConfig:
    """ListOps, one layer of width 64.

    hrrformer train --task listops --preset small --data basic_lra/

    One thread of an AMD EPYC, 28 minutes: test accuracy 37.0% (seed 0, generated data). Paper: 38.79, at width 512.
    """
    model = ModelConfig(17, 2000, 10, dim=64, positions="learned", use_mask=True, pooling="masked-mean")
    return _small("listops", model, epochs=2, length_buckets=(750, 1000, 1250, 1500, 2000))


def text() -> TrainConfig:
    """Bytes of film reviews, one layer of width 64.

    hrrformer train --task text --preset small --data aclImdb/

    One thread of an AMD EPYC, about 1,000 CPU-seconds: test accuracy 64.4%, 63.7% (seeds 0, 1). Paper: 66.50, at width
    512.
    """
    model = ModelConfig(257, 4000, 2, dim=64, positions="learned", use_mask=True, pooling="masked-mean")
    return _small("text", model, epochs=4, length_buckets=(750, 1000, 1500, 2000, 3000, 4000))


def image() -> TrainConfig:
    """Grey CIFAR-10, one layer of width 96.

    hrrformer train --task image --preset small --data cifar-10-batches-py/

    One thread of an AMD EPYC, 84 minutes at its quiet rate: test accuracy 46.3% (seed 0). Paper: 48.47, at width 256.
    """
    return _small("image", ModelConfig(256, 1024, 10, dim=96), epochs=12)


def _small(task: str, model: ModelConfig, epochs: int, length_buckets: tuple[int, ...] = ()) -> TrainConfig:
    return TrainConfig(
        task=task,
        preset="small",
        epochs=epochs,
        batch_size=16,
        length_buckets=length_buckets,
        model=replace(model, mlp_dim=128, norm="pre", dropout=0.0),
        optimizer=OptimizerConfig(lr=2e-3, schedule="cosine", warmup_steps=200),
        log=LogConfig(steps_per_tick=100, validation_examples=1000),
    )
