"""A small GAN with random weights as a checkpoint, whose attention does something."""

from pathlib import Path

import torch

from biggan.checkpoints import KIND
from biggan.config import AttentionConfig, ModelConfig, TrainConfig
from biggan.gan import build_discriminator, build_generator
from runtime import checkpoint
from runtime.config import to_dict

SMYRF = {"num_hashes": 2, "q_cluster_size": 64, "k_cluster_size": 16}


def save_gan(path: Path, attention: str = "dense", resolutions: tuple[int, ...] = (16,), gamma: float = 1.0) -> Path:
    options = SMYRF if attention == "smyrf" else {}
    config = TrainConfig(
        data="drawn-faces",
        model=ModelConfig(resolution=32, generator_channels=4, discriminator_channels=8, dim_z=8, num_classes=1),
        attention=AttentionConfig(attention, resolutions, resolutions[:1], options),
    )
    torch.manual_seed(0)
    networks = {"generator": build_generator(config), "discriminator": build_discriminator(config)}
    state = {name: network.state_dict() for name, network in networks.items()}
    for tensors in state.values():
        for name, tensor in tensors.items():
            if name.endswith("gamma"):
                tensor.fill_(gamma)
    state["ema_generator"] = state["generator"]
    checkpoint.save(path, {"config": to_dict(config), "step": 0, **state}, KIND)
    return path
