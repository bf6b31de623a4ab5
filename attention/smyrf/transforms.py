"""Asymmetric transforms that turn a large inner product into a small Euclidean distance or a large cosine.

Each takes queries and keys with the largest query norm MQ and the largest key norm MK of their batch row, and appends
coordinates: the same number to both sides, written as `extra_dim` in `TRANSFORMS`. It returns them apart, for a linear
hash need never see the whole vectors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Parts = tuple[Tensor, Tensor, Tensor, Tensor]  # q (B, H, Nq, D), appended to q (B, H, Nq, extra_dim), k, appended to k


def none(q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> Parts:
    """Q = q, K = k. Clusters pair queries and keys by rank, which needs no common norm, only a common direction."""
    return q, q[..., :0], k, k[..., :0]


def xbox_plus(q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> Parts:
    """Q = [q; 0; sqrt(MQ² + MK² - |q|²)], K = [k; sqrt(MQ² + MK² - |k|²); 0]: all of one norm, <Q, K> = <q, k>.

    Source: Daras et al. 2020, arXiv:2010.05315, Eq. 4.
    """
    total = q_max.square() + k_max.square()
    return q, F.pad(_complement(total, q), (1, 0)), k, F.pad(_complement(total, k), (0, 1))


def xbox(q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> Parts:
    """Q = [q; 0], K = [k; sqrt(MK² - |k|²)]: keys of one norm, <Q, K> = <q, k>.

    Source: Bachrach et al. 2014, "Speeding up the Xbox recommender system", section 3.
    """
    return q, torch.zeros_like(q[..., :1]), k, _complement(k_max.square(), k)


def h2lsh(q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> Parts:
    """Q = [MK q / |q|; 0], K = [k; sqrt(MK² - |k|²)]: XBOX with every query on the keys' sphere.

    Source: Huang et al. 2018, "Accurate and fast asymmetric locality-sensitive hashing scheme for maximum inner
    product search" (H2-ALSH), the QNF transform, section 3.
    """
    return xbox(k_max * F.normalize(q, dim=-1), k, q_max, k_max)


def l2lsh(q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> Parts:
    """Q = [q / |q|; 1/2; 1/2; 1/2], K = [x; |x|²; |x|⁴; |x|⁸] with x = 0.83 k / MK.

    |Q - K|² = 1 + 3/4 - 2 <q, x> / |q| + |x|¹⁶: the last term vanishes, so near means a large inner product.
    Source: Shrivastava & Li 2014, arXiv:1405.5869, Eqs. 11-12, with their m = 3 and U = 0.83.
    """
    k = 0.83 * k / k_max.clamp_min(torch.finfo(k.dtype).tiny)
    norm_squared = k.square().sum(-1, keepdim=True)
    powers = [norm_squared, norm_squared.square(), norm_squared.square().square()]
    return F.normalize(q, dim=-1), torch.full_like(q[..., :1], 0.5).expand(*q.shape[:-1], 3), k, torch.cat(powers, -1)


def _complement(total: Tensor, x: Tensor) -> Tensor:
    """The coordinate that brings |x|² to `total`; rounding (or an ignored token) may have |x|² above it."""
    return (total - x.square().sum(-1, keepdim=True)).clamp_min(0.0).sqrt()


class Transform(NamedTuple):
    """`parts(q (B, H, Nq, D), k (B, H, Nk, D), q_max (B, H, 1, 1), k_max (B, H, 1, 1))`, and what it appends."""

    parts: Callable[[Tensor, Tensor, Tensor, Tensor], Parts]
    extra_dim: int

    def apply(self, q: Tensor, k: Tensor, q_max: Tensor, k_max: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides as whole vectors, with D + extra_dim coordinates."""
        q, q_extra, k, k_extra = self.parts(q, k, q_max, k_max)
        return torch.cat([q, q_extra], -1), torch.cat([k, k_extra], -1)


TRANSFORMS = {
    "xbox+": Transform(xbox_plus, 2),
    "xbox": Transform(xbox, 1),
    "h2lsh": Transform(h2lsh, 1),
    "l2lsh": Transform(l2lsh, 3),
    "none": Transform(none, 0),
}


def get_transform(name: str) -> Transform:
    """ValueError lists the valid names."""
    if name not in TRANSFORMS:
        raise ValueError(f"unknown transform {name!r}; available: {', '.join(TRANSFORMS)}")
    return TRANSFORMS[name]
