"""Self-attention over image positions (SAGAN, Zhang et al. 2019, arXiv:1805.08318, section 3; BigGAN's variant)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attention.registry import Mechanism, available_attention, build_attention, get_mechanism


def can_stand(mechanism: Mechanism) -> bool:
    """Whether a mechanism can stand in `SpatialAttention`."""
    return mechanism.unequal_lengths is True and mechanism.value_dim is True


class SpatialAttention(nn.Module):
    """gamma * o(attend(theta(x), pool(phi(x)), pool(g(x)))) + x.

    Every position is a query, and every 2x2 window of positions a key. `gamma` starts at 0, so that the block starts
    as the identity.

    Args:
        channels: a multiple of 8.
        attention: a registered mechanism that takes unequal lengths and a value size of its own.
        conv: `(in_channels, out_channels) -> module`, a 1x1 convolution without bias; None means a plain nn.Conv2d.
        options: of the mechanism; `scale`, where it has one, defaults to 1.0 here, and `head_dim` to channels / 8.

    Raises:
        ValueError: channels that 8 does not divide, or a mechanism that cannot stand here.
    """

    def __init__(
        self,
        channels: int,
        attention: str = "smyrf",
        conv: Callable[[int, int], nn.Module] | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        if channels < 8 or channels % 8:
            raise ValueError(f"SpatialAttention needs channels that are a multiple of 8, not {channels}")
        mechanism = get_mechanism(attention)
        if not can_stand(mechanism):
            names = ", ".join(name for name in available_attention() if can_stand(get_mechanism(name)))
            raise ValueError(
                f"attention {attention!r} cannot stand in SpatialAttention, which has fewer keys than queries and "
                f"values of another size; these can: {names}"
            )
        conv = conv or partial(nn.Conv2d, kernel_size=1, bias=False)
        self.theta = conv(channels, channels // 8)
        self.phi = conv(channels, channels // 8)
        self.g = conv(channels, channels // 2)
        self.o = conv(channels // 2, channels)
        self.gamma = nn.Parameter(torch.zeros(()))
        known = {"scale": 1.0, "num_heads": 1, "head_dim": channels // 8}
        filled = {option: value for option, value in known.items() if option in mechanism.options}
        self.attention = build_attention(attention, **filled | options)

    def check_resolution(self, resolution: int) -> None:
        """ValueError where the mechanism cannot take square feature maps of this size."""
        if resolution % 2:
            raise ValueError(f"SpatialAttention needs even height and width, not {resolution}x{resolution}")
        self.attention.check_lengths(resolution**2, resolution**2 // 4)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W); ValueError where H or W is odd."""
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            raise ValueError(f"SpatialAttention needs even height and width, not {height}x{width}")
        q = _tokens(self.theta(x))  # (B, 1, HW, C/8)
        k = _tokens(F.max_pool2d(self.phi(x), 2))  # (B, 1, HW/4, C/8)
        v = _tokens(F.max_pool2d(self.g(x), 2))  # (B, 1, HW/4, C/2)
        out = self.attention(q, k, v)  # (B, 1, HW, C/2)
        out = out.squeeze(1).transpose(1, 2).unflatten(2, (height, width))  # (B, C/2, H, W)
        return torch.addcmul(x, self.gamma, self.o(out))  # in the memory format of x


def _tokens(x: Tensor) -> Tensor:
    """(B, D, H, W) -> (B, 1, HW, D), row by row."""
    return x.flatten(2).transpose(1, 2).unsqueeze(1)
