"""Tiny packed tasks that can be learned in a second, and a configuration that does so."""

from dataclasses import replace

import numpy as np

from hrrformer.config import LogConfig, TrainConfig
from hrrformer.packed import write_packed
from hrrformer.presets import get_preset

SIZES = {"train": 200, "validation": 40, "test": 40}


def draw_text(generator, label):
    """8 to 24 letters: mostly a in class 0, mostly b in class 1."""
    return np.where(generator.random(generator.integers(8, 25)) < 0.75, b"ab"[label], b"ba"[label])


def draw_noise(generator, label):
    """As `draw_text`, whatever the label."""
    return draw_text(generator, generator.integers(2))


def draw_picture(generator, label):
    """8 x 8 pixels, in class 1 with a bright right half."""
    return generator.integers(0, 60, (8, 8)) + 150 * label * (np.arange(8) >= 4)


def pack(path, task, max_length, class_names, draw):
    """Writes a packed file of SIZES examples; `draw(generator, label)` gives the symbols of one."""
    generator, splits = np.random.default_rng(0), {}
    for split, size in SIZES.items():
        labels = [i % len(class_names) for i in range(size)]
        splits[split] = [((draw(generator, label).astype(np.uint8).tobytes(),), label) for label in labels]
    first_id = 1 if task in ("text", "malware") else 0
    description = {"task": task, "max_length": max_length, "first_id": first_id, "class_names": class_names}
    write_packed(path, splits, description | {"source": f"a tiny {task}", "fingerprint": path.stem})
    return path


def pack_text(folder):
    return pack(folder / "text.safetensors", "text", 24, ("neg", "pos"), draw_text)


def pack_image(folder):
    return pack(folder / "image.safetensors", "image", 64, ("dark", "half"), draw_picture)


def tiny_text_config(data, out) -> TrainConfig:
    """25 steps of 8 texts, five a tick; a validation every second tick, a checkpoint every tick."""
    preset = get_preset("text", "single")
    return replace(
        preset,
        data=str(data),
        out=str(out),
        device="cpu",
        epochs=1,
        batch_size=8,
        length_buckets=(16,),
        model=replace(preset.model, dim=16, num_heads=2, mlp_dim=16, max_length=24),
        optimizer=replace(preset.optimizer, lr=1e-2),
        log=LogConfig(steps_per_tick=5, validate_every_ticks=2, checkpoint_every_ticks=1),
    )


def tiny_image_config(data, out) -> TrainConfig:
    """25 steps of 8 pictures."""
    preset = get_preset("image", "single")
    return replace(
        preset,
        data=str(data),
        out=str(out),
        device="cpu",
        epochs=1,
        batch_size=8,
        model=replace(preset.model, dim=16, num_heads=2, mlp_dim=16, max_length=64, num_outputs=2),
        optimizer=replace(preset.optimizer, lr=1e-2),
        log=LogConfig(steps_per_tick=5, validate_every_ticks=2, checkpoint_every_ticks=1),
    )
