"""Nyströmformer: the softmax matrix rebuilt from its products with a few landmarks.

Xiong et al. 2021, "Nyströmformer: A Nyström-Based Algorithm for Approximating Self-Attention",
https://arxiv.org/abs/2102.03902. Landmarks q̃, k̃ are means of M equal segments of the queries and of the keys
(Eq. 10), and

    softmax(s q k̃ᵀ) A⁺ softmax(s q̃ kᵀ) v,   A = softmax(s q̃ k̃ᵀ)        (Eq. 13)

with the Moore-Penrose inverse A⁺ by six steps of Z <- Z (13 I - AZ (15 I - AZ (7 I - AZ))) / 4 (Eq. 11), and a
depthwise convolution of the values over the tokens added (section 3.3).

Here segments are of the real tokens alone, so that padding changes nothing; with no more tokens than landmarks each
token is its own landmark and the others are left out. Z starts from Aᵀ / (|A|₁ |A|∞) of each head's own A; the authors'
code takes the largest norm of the whole batch.

The authors' Long Range Arena runs have 128 landmarks and convolve over 35 tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.dense import masked_attention
from attention.registry import AttentionFunction, check_inputs, register

INVERSE_STEPS = 6


def nystrom_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    num_landmarks: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    inverse_steps: int = INVERSE_STEPS,
) -> Tensor:
    """softmax(s q k̃ᵀ) A⁺ softmax(s q̃ kᵀ) v, without the convolution. Computes A⁺ in float32 at least.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        num_landmarks: M.
        scale: s; None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored.
        inverse_steps: iterations for A⁺.

    Returns:
        (B, H, N, Dv).

    Raises:
        ValueError: shapes that do not fit together.
    """
    check_inputs("nystromformer", q, k, v, key_padding_mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    means, used = segment_means(q.shape[2], num_landmarks, key_padding_mask, q)  # (B or 1, 1, M, N), (B or 1, 1, 1, M)
    q_marks, k_marks = means @ q, means @ k  # (B, H, M, D)
    dtype = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        core = _softmax(scale * q_marks.to(dtype) @ k_marks.to(dtype).transpose(-1, -2), used)
        core = core * used.transpose(-1, -2)  # landmarks of empty segments: rows of zeros, which the inverse keeps
        inverse = pseudo_inverse(core, inverse_steps)  # (B, H, M, M)
    visible = None if key_padding_mask is None else ~key_padding_mask[:, None, None]
    summary = masked_attention(q_marks, k, v, visible, scale)  # (B, H, M, Dv)
    summary = inverse @ summary.to(dtype)
    return masked_attention(q, k_marks, summary.to(v.dtype), used, scale)


def segment_means(num_tokens: int, num_landmarks: int, mask: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix that takes the means of the segments, (B or 1, 1, M, N), and which segments have a token.

    The r-th of n real tokens, counted from 0, is in segment floor(r M / n); with n <= M, in segment r.

    Returns:
        The matrix in the dtype of `like`, and bool (B or 1, 1, 1, M).
    """
    if mask is None:
        mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=like.device)
    real = (~mask).long()
    rank = real.cumsum(dim=1) - 1  # (B, N), of the real tokens
    count = real.sum(dim=1, keepdim=True)  # (B, 1)
    segment = rank * num_landmarks // count.clamp_min(num_landmarks)
    marks = torch.arange(num_landmarks, device=like.device)[:, None]
    member = ((segment[:, None] == marks) & ~mask[:, None])[:, None]  # (B, 1, M, N)
    sizes = member.sum(dim=-1, keepdim=True)  # (B, 1, M, 1)
    return member.to(like.dtype) / sizes.clamp_min(1).to(like.dtype), (sizes > 0).transpose(-1, -2)


def pseudo_inverse(matrix: Tensor, steps: int = INVERSE_STEPS) -> Tensor:
    """The Moore-Penrose inverse of (..., M, M) by the iteration of Eq. 11 (Razavi et al. 2014)."""
    norms = matrix.abs().sum(-2).amax(-1) * matrix.abs().sum(-1).amax(-1)  # |A|₁ |A|∞
    inverse = matrix.transpose(-1, -2) / torch.where(norms == 0, 1.0, norms)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    for _ in range(steps):
        product = matrix @ inverse
        inverse = 0.25 * inverse @ (13 * eye - product @ (15 * eye - product @ (7 * eye - product)))
    return inverse


def _softmax(scores: Tensor, visible: Tensor) -> Tensor:
    return scores.masked_fill(~visible, -1e30).softmax(dim=-1) * visible


@register(
    "nystromformer",
    unequal_lengths="its landmarks and its convolution run over tokens that are queries, keys and values",
    value_dim=True,
    causal="its landmarks are means over all positions",
    kind="approximation",
    parameters=True,
)
class NystromAttention(AttentionFunction):
    """`nystrom_attention` plus a learned convolution of the values over the tokens, one filter a head.

    Args:
        num_heads: H.
        num_landmarks: M.
        conv_size: tokens that the convolution sees, an odd number; 0 leaves it out.
        scale: None means 1/sqrt(D).
        inverse_steps: iterations for the inverse of A.

    Raises:
        ValueError: sizes that make no sense.
    """

    def __init__(
        self,
        num_heads: int,
        num_landmarks: int = 64,
        conv_size: int = 33,
        scale: float | None = None,
        inverse_steps: int = INVERSE_STEPS,
    ) -> None:
        super().__init__()
        if num_landmarks < 1 or inverse_steps < 1:
            raise ValueError(f"num_landmarks and inverse_steps must be positive, not {num_landmarks}, {inverse_steps}")
        if conv_size < 0 or (conv_size and conv_size % 2 == 0):
            raise ValueError(f"conv_size must be odd, or 0 for no convolution, not {conv_size}")
        self.num_landmarks, self.scale, self.inverse_steps = num_landmarks, scale, inverse_steps
        self.conv = None
        if conv_size:
            self.conv = nn.Conv2d(
                num_heads, num_heads, (conv_size, 1), padding=(conv_size // 2, 0), groups=num_heads, bias=False
            )

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        out = nystrom_attention(q, k, v, self.num_landmarks, self.scale, key_padding_mask, self.inverse_steps)
        if self.conv is None:
            return out
        if key_padding_mask is not None:
            v = v.masked_fill(key_padding_mask[:, None, :, None], 0.0)
        return out + self.conv(v)
