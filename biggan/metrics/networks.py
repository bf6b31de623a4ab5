"""The feature networks that distances can be measured with, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from biggan.metrics.backbones import load_timm, load_torchvision
from biggan.metrics.inception import FIDInception
from biggan.metrics.inception_weights import load_inception
from runtime.errors import UserError

LIBRARIES = {"torchvision": load_torchvision, "timm": load_timm}


class FeatureNetwork(Protocol):
    """Images to features; an nn.Module.

    Attributes:
        name, weights_hash: identify the features; part of every statistics file.
        feature_dim: number of features.
    """

    name: str
    weights_hash: str
    feature_dim: int

    def __call__(self, images: Tensor, resize_rule: str) -> Tensor:
        """uint8 images (B, 3, H, W) of any size -> float32 features (B, feature_dim)."""

    def to(self, device: torch.device, memory_format: torch.memory_format) -> FeatureNetwork: ...


def load_network(name: str = FIDInception.name, weights: str | Path | None = None) -> FeatureNetwork:
    """A feature network, ready to infer.

    Args:
        name: `fid-inception`, `torchvision:NAME` or `timm:NAME`; the latter two also with the size of the images that
            the network sees, as in `timm:vit_small_patch14_dinov2.lvd142m@224`.
        weights: their file; None takes the usual ones, from the cache or the network; `random`, for torchvision and
            timm, is for trying things out.

    Raises:
        UserError: no such network, or its weights cannot be had.
    """
    if name == FIDInception.name:
        return load_inception(weights)
    library, _, rest = name.partition(":")
    model, at, size = rest.partition("@")
    if library not in LIBRARIES or not model or (at and not (size.isdigit() and int(size) > 0)):
        choices = ", ".join([FIDInception.name, *(f"{library}:NAME[@SIZE]" for library in LIBRARIES)])
        raise UserError(f"unknown feature network {name!r}; choose from {choices}")
    return LIBRARIES[library](model, weights, int(size) if size else None)


def default_resize_rule(network: FeatureNetwork) -> str:
    """Published FIDs have the rule of pytorch-fid; other networks were trained on images resized with a filter."""
    return "clean-fid" if network.name.startswith(tuple(LIBRARIES)) else "pytorch-fid"
