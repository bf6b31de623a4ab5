"""The hash directions of SMYRF attention, drawn on the host: the same clusters on every device for the same seed.

Left alone, `SmyrfAttention` draws from its device's own generator, and every kind of device has another one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from attention import SmyrfAttention
from attention.smyrf.hashing import get_hash_family
from biggan.blocks import Stage


def draw_projections(network: nn.Module, calls: Sequence[int], generator: torch.Generator) -> list[Tensor]:
    """One tensor (*calls, *shape) for each SMYRF attention of the network, in order; none for other mechanisms."""
    return [
        get_hash_family(mechanism.hashing).draw((*calls, *mechanism.projection_shape(*lengths)), generator=generator)
        for mechanism, lengths in _mechanisms(network)
    ]


def use_projections(network: nn.Module, projections: Iterable[Tensor]) -> None:
    """Hands each SMYRF attention the directions of its next calls; no projections: each draws its own again."""
    projections = list(projections)
    mechanisms = [mechanism for mechanism, _ in _mechanisms(network)]
    for mechanism, directions in zip(mechanisms, projections or [None] * len(mechanisms), strict=True):
        mechanism.projections = directions


def _mechanisms(network: nn.Module) -> list[tuple[SmyrfAttention, tuple[int, int, int]]]:
    """Every SMYRF attention with its numbers of queries and keys and its head size."""
    stages = [module for module in network.modules() if isinstance(module, Stage) and module.attention is not None]
    return [
        (stage.attention.attention, (stage.resolution**2, stage.resolution**2 // 4, stage.attention.theta.out_channels))
        for stage in stages
        if isinstance(stage.attention.attention, SmyrfAttention)
    ]
