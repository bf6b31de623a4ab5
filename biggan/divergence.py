"""What the numbers of a GAN's networks, in the content of a checkpoint, say when a run stops being finite."""

from __future__ import annotations

from typing import Any

from runtime.divergence import non_finite

NETWORKS = ("generator", "discriminator", "ema_generator")


def non_finite_weights(tree: dict[str, Any]) -> dict[str, float]:
    """The weights and statistics, on the host, that hold a NaN or an infinity."""
    return non_finite({f"{name}.{key}": x for name in NETWORKS for key, x in tree.get(name, {}).items()})


def spectral_norms(tree: dict[str, Any]) -> dict[str, float]:
    """Those that the layers of the two trained networks have stored."""
    return {
        f"{name}.{key.removesuffix('.sv0')}": float(value)
        for name in NETWORKS[:2]
        for key, value in tree[name].items()
        if key.endswith(".sv0")
    }
