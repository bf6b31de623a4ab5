"""What a checkpoint of a GAN holds, and the ways a generator comes back from one.

Keys: `config` (the whole TrainConfig as plain values), `generator`, `ema_generator`, `discriminator`,
`generator_optimizer`, `discriminator_optimizer`, `objective`, `step`, and of a run also `progress`, `rng` and `data`.
An export is a safetensors file with the averaged generator alone; the configuration and a checksum over both are in its
metadata.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import safetensors
from safetensors.torch import save as serialize_safetensors

from biggan.config import AttentionConfig, ModelConfig, OptimizerConfig, TrainConfig
from biggan.gan import build_generator
from biggan.generator import Generator
from runtime import checkpoint
from runtime.config import from_dict, to_dict
from runtime.errors import UserError
from runtime.run_folder import read_checkpoint
from runtime.state import load_weights

KIND = "biggan"
BEST = "best.pt"  # of a run's checkpoints, by the metric that it is told
STATE_KEYS = ("generator", "ema_generator", "discriminator", "generator_optimizer", "discriminator_optimizer")


def read(path: str | Path) -> tuple[TrainConfig, dict[str, Any]]:
    """Configuration and content of a checkpoint, an export, or the newest whole checkpoint of a run directory.

    Raises:
        UserError: there is none, or it is damaged, holds code, or is another program's.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tree = _read_export(path)
    else:
        path, tree = read_checkpoint(path, KIND)
    return from_dict(TrainConfig, tree.get("config"), f"configuration in {path}"), tree


def load_generator(
    path: str | Path, weights: str = "ema", attention: AttentionConfig | None = None
) -> tuple[Generator, TrainConfig]:
    """A generator in evaluation mode on the CPU.

    Args:
        weights: 'ema' (averaged) or 'raw'.
        attention: another mechanism or other options than the network was trained with; resolutions stay.
    """
    config, tree = read(path)
    if attention is not None:
        config = replace(config, attention=replace(config.attention, name=attention.name, options=attention.options))
    key = {"ema": "ema_generator", "raw": "generator"}[weights]
    if key not in tree:
        raise UserError(f"{path} holds no {weights} weights; use --weights {'ema' if weights == 'raw' else 'raw'}.")
    generator = build_generator(config)
    load_weights(generator, tree[key], "generator")
    return generator.eval().requires_grad_(False), config


def export(source: str | Path, out: str | Path, weights: str = "ema") -> None:
    """Writes the generator of a checkpoint as safetensors, atomically."""
    generator, config = load_generator(source, weights)
    tensors = {name: value.contiguous() for name, value in generator.state_dict().items()}
    content = {"config": to_dict(config), "ema_generator": tensors}
    metadata = {"format": KIND, "config": json.dumps(content["config"]), "checksum": checkpoint.checksum(content)}
    data = serialize_safetensors(tensors, metadata)
    checkpoint.write_atomically(Path(out), lambda file: file.write(data))


def save_converted(out: str | Path, converted: dict[str, Any]) -> None:
    """Writes what `conversion.convert_original` returns as a checkpoint: to sample from, or to start a run from."""
    config = TrainConfig(
        preset="converted",
        data="",
        model=ModelConfig(**converted["model"]),
        attention=AttentionConfig(**converted["attention"]),
        optimizer=OptimizerConfig(**converted["optimizer"]),
    )
    state = {key: converted[key] for key in STATE_KEYS if key in converted}
    checkpoint.save(out, {"config": to_dict(config), "step": converted["step"], **state}, KIND)


def _read_export(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no file at {path}.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != KIND or "config" not in metadata:
                raise UserError(f"{path} is no export of 'biggan export'.")
            content = {
                "config": json.loads(metadata["config"]),
                "ema_generator": {k: file.get_tensor(k) for k in sorted(file.keys())},
            }
            sound = metadata.get("checksum") == checkpoint.checksum(content)
    except (UserError, OSError):
        raise
    except Exception:  # SafetensorError, and what JSON and torch raise on values that no such file has
        raise UserError(f"{path} is damaged or is not a safetensors file.") from None
    if not sound:
        raise UserError(f"{path} is damaged, its content does not match its checksum; or it has none: export it again.")
    return content
