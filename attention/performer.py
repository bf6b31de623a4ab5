"""Performer: random features whose products estimate the softmax's exponentials without bias (FAVOR+).

Choromanski et al. 2021, "Rethinking Attention with Performers", https://arxiv.org/abs/2009.14794. For directions ω from
N(0, I), drawn orthogonal to each other in groups of D (section 2.4),

    exp(q·k) = E[exp(ω·q - |q|²/2) exp(ω·k - |k|²/2)]        (Lemma 1)

so positive features φ(x) = exp(ω·x - |x|²/2) / sqrt(M) make linear attention an estimate of softmax attention (Eqs. 4
and 5). `kernel="relu"` is the paper's other choice, φ(x) = relu(ω·x) / sqrt(M) + 1e-3 (section 4.2, "generalised
attention"), which estimates no softmax.

The Long Range Arena's Performer has the relu kernel without random directions, φ(x) = relu(x) + 1e-3:
`kernel="relu", num_features=0`.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.linear import feature_attention
from attention.registry import AttentionFunction, check_inputs, register

KERNELS = ("softmax", "relu")
RELU_FLOOR = 1e-3  # keeps every weight above zero


def performer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    directions: Tensor | None,
    kernel: str = "softmax",
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Linear attention with random features. Computes in float32 at least.

    The softmax kernel's features are divided by the largest of each query's, and by the largest of all keys of a head:
    both cancel, unless they are more than a number's range apart.

    Args:
        q: (B, H, Nq, D).  k: (B, H, Nk, D).  v: (B, H, Nk, Dv).
        directions: (M, D), as `orthogonal_directions` draws; None, with the relu kernel, takes the vectors themselves.
        kernel: "softmax" or "relu".
        scale: of the products q·k; None means 1/sqrt(D).
        key_padding_mask: bool (B, Nk), True = ignored.
        causal: query i sees the keys up to i; wants as many keys as queries.

    Returns:
        (B, H, Nq, Dv) in v's dtype. A query that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or no such kernel.
    """
    check_inputs("performer", q, k, v, key_padding_mask)
    check_kernel(kernel, 0 if directions is None else len(directions))
    dtype = v.dtype
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        q, k = math.copysign(1, scale) * math.sqrt(abs(scale)) * q, math.sqrt(abs(scale)) * k
        if kernel == "softmax":
            q_exponents, k_exponents = (_exponents(x, directions) for x in (q, k))
            if key_padding_mask is not None:
                k_exponents = k_exponents.masked_fill(key_padding_mask[:, None, :, None], -1e30)
            q = (q_exponents - q_exponents.detach().amax(-1, keepdim=True)).exp()
            k = (k_exponents - k_exponents.detach().amax((-2, -1), keepdim=True)).exp()
        else:
            q, k = (_relu_features(x, directions) for x in (q, k))
        return feature_attention(q, k, v, key_padding_mask, causal).to(dtype)


def _exponents(x: Tensor, directions: Tensor) -> Tensor:
    """ω·x - |x|²/2: (..., D) -> (..., M)."""
    return x @ directions.to(x.dtype).T - x.square().sum(-1, keepdim=True) / 2


def _relu_features(x: Tensor, directions: Tensor | None) -> Tensor:
    if directions is None:
        return F.relu(x) + RELU_FLOOR
    return F.relu(x @ directions.to(x.dtype).T) / math.sqrt(len(directions)) + RELU_FLOOR


def orthogonal_directions(num_features: int, dim: int, generator: torch.Generator | None = None) -> Tensor:
    """(num_features, dim): Gaussian directions, orthogonal in groups of `dim`, with the lengths of Gaussian vectors."""
    groups = []
    for _ in range(0, num_features, dim):
        square, triangle = torch.linalg.qr(torch.randn(dim, dim, generator=generator))
        groups.append((square * triangle.diagonal().sign()).T)  # with these signs, uniform over the rotations
    lengths = torch.randn(num_features, dim, generator=generator).norm(dim=1, keepdim=True)
    return torch.cat(groups)[:num_features] * lengths if groups else torch.empty(0, dim)


def check_kernel(kernel: str, num_features: int) -> None:
    """ValueError for an unknown kernel, or too few features."""
    if kernel not in KERNELS:
        raise ValueError(f"unknown kernel {kernel!r}; valid ones are {', '.join(KERNELS)}")
    if num_features < 0 or (kernel == "softmax" and num_features == 0):
        raise ValueError(f"the {kernel} kernel cannot have {num_features} features; only relu can do with 0")


@register("performer", unequal_lengths=True, value_dim=True, causal=True, kind="approximation")
class PerformerAttention(AttentionFunction):
    """`performer_attention` as a mechanism, without learned parameters: its directions are a buffer.

    Args:
        head_dim: D.
        num_features: M; the error of the estimate falls with 1/sqrt(M). The relu kernel takes 0 for no directions.
        kernel: "softmax" or "relu".
        scale: None means 1/sqrt(D).
        causal: query i sees the keys up to i.
    """

    def __init__(
        self,
        head_dim: int,
        num_features: int = 256,
        kernel: str = "softmax",
        scale: float | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_kernel(kernel, num_features)
        self.kernel, self.scale, self.causal = kernel, scale, causal
        self.register_buffer("directions", orthogonal_directions(num_features, head_dim) if num_features else None)

    @torch.no_grad()
    def redraw(self) -> None:
        """Draws other directions; the paper does so from time to time while training (section 4.2)."""
        if self.directions is not None:
            self.directions.copy_(orthogonal_directions(*self.directions.shape))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q (B, H, Nq, D), k (B, H, Nk, D), v (B, H, Nk, Dv), mask bool (B, Nk), True = ignored -> (B, H, Nq, Dv)."""
        return performer_attention(
            q, k, v, self.directions, self.kernel, self.scale, key_padding_mask, causal=self.causal
        )
