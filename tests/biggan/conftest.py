"""A configuration that trains in a second."""

from dataclasses import replace

import pytest
import torch

from biggan.config import LogConfig, ModelConfig
from biggan.presets import get_preset


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tiny_config(tmp_path):
    """Four images a step, a checkpoint every second step, eight steps in all."""
    return replace(
        get_preset("demo"),
        out=str(tmp_path / "run"),
        device="cpu",
        total_kimg=0.032,
        global_batch_size=4,
        drawn_faces=24,
        model=ModelConfig(resolution=32, generator_channels=4, discriminator_channels=4, dim_z=8),
        log=LogConfig(kimg_per_tick=0.008, checkpoint_every_ticks=1, sample_every_ticks=0, grid=2),
    )
