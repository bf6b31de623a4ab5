"""H-Transformer-1D attention: exact among neighbouring blocks, and between averages the further apart tokens are.

Zhu and Soricut 2021, "H-Transformer-1D: Fast One-Dimensional Hierarchical Attention for Sequences",
https://arxiv.org/abs/2107.11906, sections 5 and 6. At level l, tokens are averages of 2^l neighbours (of queries and
keys; values are summed), and blocks hold `block_size` of them (the paper's numerical rank N_r). Level 0 attends to the
own block and both neighbours; level l to both neighbours, less the quadrant next to the diagonal, which the level below
has done. So every pair of tokens is met once, at the lowest level at which their blocks touch. The softmax runs over
all levels.

With a causal mask, levels look to the left only, and the coarse query is the first of its tokens, as in the authors'
code: their average would look ahead. The Long Range Arena's numbers are the paper's own, with N_r = 16.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.blocks import (
    OWN_POSITION,
    attend_in_blocks_with_lse,
    both,
    join_blocks,
    key_offsets,
    split_blocks,
    visible_keys,
    with_neighbors,
)
from attention.merging import merge
from attention.registry import AttentionFunction, check_inputs, register


def h_transformer_1d_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention with scores between ever coarser averages away from the diagonal.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        block_size: N_r, even.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored: averages are over the other tokens.
        causal: token i sees tokens up to i.

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or an odd block size.
    """
    check_inputs("h-transformer-1d", q, k, v, key_padding_mask)
    check_block_size(block_size)
    num_tokens = q.shape[2]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    num_blocks = 1 << (-(-num_tokens // block_size) - 1).bit_length()  # a power of two
    padding = num_blocks * block_size - num_tokens
    mask = key_padding_mask
    if mask is None:
        mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    hidden = F.pad(mask, (0, padding), value=True)  # (B or 1, N), N = n·m from here on
    q, k, v = (F.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, padding)) for x in (q, k, v))  # (B, N, H, D)
    q, k, v = (x.masked_fill(hidden[..., None, None], 0.0) for x in (q, k, v))

    levels = [_nearest(q, k, v, hidden, block_size, scale, causal)]
    dtype = torch.promote_types(q.dtype, torch.float32)
    sums = [x.to(dtype) for x in (q, k, v)]
    count = (~hidden).to(dtype)[..., None, None]  # real tokens in each coarse one: (B or 1, N / 2^l, 1, 1)
    while num_blocks > 2:
        num_blocks //= 2
        q = q[:, ::2]
        count, *sums = (x[:, ::2] + x[:, 1::2] for x in (count, *sums))
        means = [(x / count.clamp_min(1)).to(q.dtype) for x in sums]
        coarse_q = q if causal else means[0]
        levels.append(_beside(coarse_q, *means[1:], count[..., 0, 0], block_size, scale, causal))
    merged = levels.pop()
    while levels:  # from the coarsest level down: each at its own length, so that all together are linear
        merged = merge(levels.pop(), tuple(x.repeat_interleave(2, dim=1) for x in merged))
    return merged[0][:, :num_tokens].transpose(1, 2)


def check_block_size(block_size: int) -> None:
    """ValueError unless blocks have two halves."""
    if block_size < 2 or block_size % 2:
        raise ValueError(f"block_size must be even and positive, not {block_size}")


def _nearest(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, block_size: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """Level 0: the own block and its neighbours. q, k, v (B, N, H, D) -> out (B, N, H, Dv), lse (B, N, H)."""
    num_tokens = q.shape[1]
    before = min(1, num_tokens // block_size - 1)
    after = 0 if causal else before
    visible = visible_keys(hidden, num_tokens, block_size, before, after, q.device)  # (B, n, 1, L)
    if causal:
        visible = both(visible, key_offsets(block_size, before, after, q.device)[None, None] <= 0)
    q, k, v = (split_blocks(x, block_size) for x in (q, k, v))  # (B, n, m, H, D)
    k, v = (with_neighbors(x, before, after) for x in (k, v))  # (B, n, L, H, D)
    out, lse = attend_in_blocks_with_lse(q, k, v, visible, scale)
    return join_blocks(out, num_tokens), join_blocks(lse, num_tokens)


def _beside(
    q: Tensor, k: Tensor, v: Tensor, count: Tensor, block_size: int, scale: float, causal: bool
) -> tuple[Tensor, Tensor]:
    """A coarse level: both neighbours (causal: the left one) without the quadrants next to the diagonal.

    q, k, v (B, N, H, D) are means over `count` (B, N) tokens, and a key weighs as many. Returns as `_nearest`.
    """
    num_tokens, half = q.shape[1], block_size // 2
    q, k, v, count = (split_blocks(x, block_size) for x in (q, k, v, count))  # (B, n, m, H, D), count (B, n, m)
    k, v, count = (_neighbors(x, causal) for x in (k, v, count))  # (B, n, L, ...)
    in_first_half = torch.arange(block_size, device=q.device) < half
    left = ~(in_first_half[:, None] & ~in_first_half)  # (m, m)
    quadrants = left if causal else torch.cat([left, left.flip(0, 1)], dim=1)  # (m, L)
    visible = (count > 0)[:, :, None] & quadrants
    out, lse = attend_in_blocks_with_lse(q, k, v, visible, scale, count.clamp_min(1).log()[:, :, None])
    return join_blocks(out, num_tokens), join_blocks(lse, num_tokens)


def _neighbors(x: Tensor, causal: bool) -> Tensor:
    """The block to the left and, unless causal, the one to the right: (B, n, m, ...) -> (B, n, m or 2m, ...)."""
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (1, 1))
    return x[:, :-2] if causal else torch.cat([x[:, :-2], x[:, 2:]], dim=2)


@register("h-transformer-1d", unequal_lengths=OWN_POSITION, value_dim=True, causal=True, kind="approximation")
class HTransformer1DAttention(AttentionFunction):
    """`h_transformer_1d_attention` as a mechanism, without parameters; its options are explained there."""

    def __init__(self, block_size: int = 16, scale: float | None = None, causal: bool = False) -> None:
        super().__init__()
        check_block_size(block_size)
        self.options = {"block_size": block_size, "scale": scale, "causal": causal}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        return h_transformer_1d_attention(q, k, v, key_padding_mask=key_padding_mask, **self.options)
