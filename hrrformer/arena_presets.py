"""Configurations of the size that the Long Range Arena gave every mechanism: presets `arena` of its tasks.

Width, heads, depth, MLP, dropout, batch and length of training are those of the base configurations of
github.com/google-research/long-range-arena (Tay et al. 2020, arXiv:2011.04006). Differences: sequences of text have the
4,000 bytes of the paper, not the 1,000 of the configuration; the width of queries in Pathfinder is that of the model,
not half of it; rates fall as a cosine to the end from the largest that the original's schedule reaches; dropout does
not touch attention's weights, and no layer norm follows the last layer.

    hrrformer train --task text --preset arena --attention performer --data aclImdb/

None of these was run.
"""

from __future__ import annotations

from dataclasses import replace

from hrrformer.config import ModelConfig, OptimizerConfig, TrainConfig

_WEIGHT_DECAY = 0.1


def listops() -> TrainConfig:
    """ListOps, six layers of width 512: 5,000 steps of 32.

    hrrformer train --task listops --preset arena --data basic_lra/
    """
    model = ModelConfig(17, 2000, 10, dim=512, num_heads=8, num_layers=6, mlp_dim=2048, use_mask=True)
    return _sequences("listops", model, max_steps=5000, lr=1.6e-3, warmup_steps=1000)


def text() -> TrainConfig:
    """Bytes of film reviews, four layers of width 256: 20,000 steps of 32.

    hrrformer train --task text --preset arena --data aclImdb/
    """
    model = ModelConfig(257, 4000, 2, dim=256, num_heads=4, num_layers=4, mlp_dim=1024, use_mask=True)
    return _sequences("text", model, max_steps=20000, lr=5.6e-4, warmup_steps=8000)


def retrieval() -> TrainConfig:
    """Pairs of papers, four layers of width 128: 5,000 steps of 32, all of them in the original's warm-up.

    hrrformer train --task retrieval --preset arena --data lra_release/tsv_data/
    """
    model = ModelConfig(257, 4000, 2, dim=128, num_heads=4, num_layers=4, mlp_dim=512, use_mask=True, dual_input=True)
    return _sequences("retrieval", model, max_steps=5000, lr=3.5e-4, warmup_steps=2500)


def image() -> TrainConfig:
    """Grey CIFAR-10, one layer of width 32: 200 epochs in batches of 256.

    hrrformer train --task image --preset arena --data cifar-10-batches-py/
    """
    model = ModelConfig(256, 1024, 10, dim=32, num_heads=1, mlp_dim=64, dropout=0.3, pooling="cls")
    return _pictures("image", model, batch_size=256, lr=5e-4, warmup_steps=175)


def pathfinder() -> TrainConfig:
    """Pathfinder at 32 x 32, one layer of width 128: 200 epochs in batches of 512.

    hrrformer train --task pathfinder --preset arena --data pathfinder32/
    """
    model = ModelConfig(256, 1024, 2, dim=128, num_heads=4, mlp_dim=128, dropout=0.2)
    return _pictures("pathfinder", model, batch_size=512, lr=1e-3, warmup_steps=312)


def _sequences(task: str, model: ModelConfig, max_steps: int, lr: float, warmup_steps: int) -> TrainConfig:
    optimizer = OptimizerConfig(
        "adamw", lr, weight_decay=_WEIGHT_DECAY, schedule="cosine", warmup_steps=warmup_steps, min_lr=0.0
    )
    model = replace(model, norm="pre", pooling="cls")
    return TrainConfig(
        task,
        "arena",
        epochs=1000,
        max_steps=max_steps,
        batch_size=32,
        label_smoothing=0.0,
        model=model,
        optimizer=optimizer,
    )


def _pictures(task: str, model: ModelConfig, batch_size: int, lr: float, warmup_steps: int) -> TrainConfig:
    optimizer = OptimizerConfig("adam", lr, schedule="cosine", warmup_steps=warmup_steps, min_lr=0.0)
    positions = "learned" if task == "image" else "fixed"
    model = replace(model, norm="pre", positions=positions)
    return TrainConfig(
        task, "arena", epochs=200, batch_size=batch_size, label_smoothing=0.0, model=model, optimizer=optimizer
    )
