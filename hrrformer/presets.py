"""Named configurations of every task. A docstring is a claim: command, hardware, time and result, or "not run".

The hyper-parameters are those of Alam et al. 2023, arXiv:2305.19534; batches are what its 16 GPUs had together. Two
things differ where tokens can be padding: it enters neither the superposition nor the mean, and batches are as long as
they need. The original: `--attention.mask-superposition false --model.pooling mean --length-buckets none`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hrrformer import arena_presets as arena
from hrrformer import small_presets as small
from hrrformer.config import LogConfig, ModelConfig, OptimizerConfig, TrainConfig
from runtime.errors import UserError


def listops_single() -> TrainConfig:
    """ListOps, one layer: 2.61M parameters. Paper: 38.79.

    hrrformer train --task listops --data basic_lra/

    Not run.
    """
    return TrainConfig(
        task="listops",
        length_buckets=(750, 1000, 1250, 1500, 2000),
        model=ModelConfig(
            vocab_size=17,
            max_length=2000,
            num_outputs=10,
            dim=512,
            num_heads=8,
            mlp_dim=256,
            positions="learned",
            norm="mlp",
            embedding_norm=True,
            use_mask=True,
            pooling="masked-mean",
        ),
        optimizer=OptimizerConfig(decay_rate=0.9, decay_examples=98000),
    )


def listops_full() -> TrainConfig:
    """ListOps, six layers: 9.17M parameters. Paper: 39.98.

    hrrformer train --task listops --preset full --data basic_lra/

    Not run.
    """
    return _with_layers(listops_single(), 6)


def listops_demo() -> TrainConfig:
    """Generated trees of 32 to 128 tokens, narrow: a whole run in a minute or two, without a download.

    hrrformer train --task listops --preset demo

    Two busy cores of an AMD EPYC: 2:14 minutes, 61 CPU-seconds; test accuracy 36.7%, most frequent class 17.0%.
    """
    base = listops_single()
    return replace(
        base,
        preset="demo",
        data="generated",
        epochs=2,
        length_buckets=(),
        model=replace(base.model, max_length=128, dim=64, num_heads=4, mlp_dim=64),
        optimizer=replace(base.optimizer, lr=2e-3, schedule="cosine", warmup_steps=50),
        log=LogConfig(validate_every_ticks=6),
    )


def text_single() -> TrainConfig:
    """Bytes of film reviews (IMDB), one layer: 2.50M parameters. Paper: 66.50.

    hrrformer train --task text --data aclImdb/

    Not run.
    """
    return TrainConfig(
        task="text",
        length_buckets=(750, 1000, 1500, 2000, 3000, 4000),
        model=ModelConfig(
            vocab_size=257,
            max_length=4000,
            num_outputs=2,
            dim=512,
            num_heads=8,
            mlp_dim=1024,
            norm="pre",
            use_mask=True,
            pooling="masked-mean",
        ),
        optimizer=OptimizerConfig(decay_rate=0.9, decay_examples=50000),
    )


def text_full() -> TrainConfig:
    """The same, six layers: 13.00M parameters. Paper: 65.38.

    hrrformer train --task text --preset full --data aclImdb/

    Not run.
    """
    return _with_layers(text_single(), 6)


def retrieval_single() -> TrainConfig:
    """Pairs of papers that cite each other or not (AAN), one layer: 0.181M parameters. Paper: 75.40.

    hrrformer train --task retrieval --data lra_release/tsv_data/

    Not run.
    """
    return TrainConfig(
        task="retrieval",
        batch_size=64,
        model=ModelConfig(
            vocab_size=257,
            max_length=4000,
            num_outputs=2,
            dim=128,
            num_heads=4,
            mlp_dim=64,
            norm="mlp",
            embedding_norm=True,
            use_mask=True,
            pooling="masked-mean",
            dual_input=True,
        ),
        optimizer=OptimizerConfig(decay_rate=0.9, decay_examples=164480),
    )


def retrieval_full() -> TrainConfig:
    """The same, four layers: 0.428M parameters. Paper: 76.15.

    hrrformer train --task retrieval --preset full --data lra_release/tsv_data/

    Not run.
    """
    return _with_layers(retrieval_single(), 4)


def image_single() -> TrainConfig:
    """Grey CIFAR-10, a pixel a token, one layer: 0.463M parameters. Paper: 48.47.

    hrrformer train --task image --data cifar-10-batches-py/

    Not run.
    """
    return TrainConfig(
        task="image",
        model=ModelConfig(
            vocab_size=256, max_length=1024, num_outputs=10, dim=256, num_heads=4, mlp_dim=128, norm="post"
        ),
        optimizer=OptimizerConfig(decay_rate=0.95, decay_examples=60000),
    )


def image_full() -> TrainConfig:
    """The same, three layers: 1.12M parameters. Paper: 50.45.

    hrrformer train --task image --preset full --data cifar-10-batches-py/

    Not run.
    """
    return _with_layers(image_single(), 3)


def image_demo() -> TrainConfig:
    """Drawn digits of 16 x 16 pixels, a narrow layer: a whole run in two minutes, without a download.

    hrrformer train --task image --preset demo

    Two busy cores of an AMD EPYC: 2:52 minutes, 96 CPU-seconds; test accuracy 78.1%, most frequent class 11.1%.
    """
    base = image_single()
    return replace(
        base,
        preset="demo",
        data="generated",
        epochs=1,
        batch_size=16,
        model=replace(base.model, max_length=256, dim=64, mlp_dim=64, positions="learned", norm="mlp"),
        optimizer=replace(base.optimizer, lr=2e-3),
        log=LogConfig(validate_every_ticks=6),
    )


def pathfinder_single() -> TrainConfig:
    """Are two dots joined by a dashed line, 32 x 32 pixels, one layer: 7.08M parameters. Paper: 70.71.

    hrrformer train --task pathfinder --data pathfinder32/

    Not run.
    """
    return TrainConfig(
        task="pathfinder",
        batch_size=128,
        model=ModelConfig(
            vocab_size=256,
            max_length=1024,
            num_outputs=2,
            dim=1024,
            num_heads=8,
            mlp_dim=256,
            positions="learned",
            norm="mlp",
        ),
        optimizer=OptimizerConfig(decay_rate=0.95, decay_examples=179968),
    )


def pathfinder_full() -> TrainConfig:
    """The same, two layers: 11.8M parameters. Paper: 72.17.

    hrrformer train --task pathfinder --preset full --data pathfinder32/

    Not run.
    """
    return _with_layers(pathfinder_single(), 2)


def pathx_single() -> TrainConfig:
    """Pathfinder at 128 x 128 pixels, one layer, the paper's only depth: 22.8M parameters. The paper has no result.

    hrrformer train --task pathx --data pathfinder128/

    Not run.
    """
    base = pathfinder_single()
    return replace(
        base,
        task="pathx",
        batch_size=256,
        model=replace(base.model, max_length=16384),
        optimizer=replace(base.optimizer, name="adamw", weight_decay=5e-4),
    )


def malware_single() -> TrainConfig:
    """Malicious or benign from the bytes of a program, one layer, the paper's only depth. Paper: 91.03 at this length.

    hrrformer train --task malware --data ember/

    4.85M parameters, 4.19M of them positions. For another length T: --model.max-length T, and --batch-size 65536 / T.

    Not run.
    """
    return TrainConfig(
        task="malware",
        epochs=10,
        batch_size=4,
        length_buckets=(1024, 4096, 16384),
        loss="two-sided",
        model=ModelConfig(
            vocab_size=257,
            max_length=16384,
            num_outputs=2,
            dim=256,
            num_heads=8,
            mlp_dim=512,
            mlp_activation="relu",
            mlp_output_bias=True,
            attention_bias=True,
            positions="learned",
            norm="pre",
            use_mask=True,
            pooling="cls",
            readout_activation="relu",
        ),
        optimizer=OptimizerConfig(decay_rate=0.85, decay_examples=800000),
    )


def _with_layers(base: TrainConfig, num_layers: int) -> TrainConfig:
    return replace(base, preset="full", model=replace(base.model, num_layers=num_layers))


PRESETS: dict[str, dict[str, Callable[[], TrainConfig]]] = {
    "listops": {
        "single": listops_single,
        "full": listops_full,
        "demo": listops_demo,
        "arena": arena.listops,
        "small": small.listops,
    },
    "text": {"single": text_single, "full": text_full, "arena": arena.text, "small": small.text},
    "retrieval": {"single": retrieval_single, "full": retrieval_full, "arena": arena.retrieval},
    "image": {
        "single": image_single,
        "full": image_full,
        "demo": image_demo,
        "arena": arena.image,
        "small": small.image,
    },
    "pathfinder": {"single": pathfinder_single, "full": pathfinder_full, "arena": arena.pathfinder},
    "pathx": {"single": pathx_single},
    "malware": {"single": malware_single},
}


def get_preset(task: str, name: str) -> TrainConfig:
    """Raises UserError that lists the tasks, or the task's presets, where there is none of this name."""
    if task not in PRESETS:
        raise UserError(f"unknown task '{task}'; tasks are {', '.join(PRESETS)}.")
    if name not in PRESETS[task]:
        raise UserError(f"task {task} has no preset '{name}'; its presets are {', '.join(PRESETS[task])}.")
    return PRESETS[task][name]()
