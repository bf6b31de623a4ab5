"""Local attention: every block of tokens attends to itself, and if wanted to its neighbours.

Liu et al. 2018, "Generating Wikipedia by Summarizing Long Sequences", https://arxiv.org/abs/1801.10198, section 4.2.4:
the sequence is cut into blocks and Eq. 1 of Vaswani et al. holds inside each. With `neighbors`, the memory blocks of
Parmar et al. 2018, "Image Transformer", https://arxiv.org/abs/1802.05751, section 3.3, on one or both sides.

The Long Range Arena's "local attention" (blocks of 50) reshapes N to (block size, number of blocks) and attends along
the first axis: a block there is every n-th token, n = N // block_size + 1. `interleaved=True` does that. Its mask is
cut the other way and hides the wrong tokens there; here it hides the padding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.blocks import (
    OWN_POSITION,
    attend_in_blocks,
    both,
    join_blocks,
    key_offsets,
    split_blocks,
    visible_keys,
    with_neighbors,
)
from attention.registry import AttentionFunction, check_inputs, register


def local_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    neighbors: int = 0,
    interleaved: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention inside blocks of consecutive tokens.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        block_size: tokens a block; the last one may be partly filled.
        neighbors: blocks on either side (causal: before) that a block's queries also see.
        interleaved: blocks hold every n-th token, n = N // block_size + 1, and so depend on the length.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored.
        causal: token i sees tokens up to i.

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or sizes that `check_blocks` refuses.
    """
    check_inputs("local", q, k, v, key_padding_mask)
    check_blocks(block_size, neighbors, interleaved)
    num_tokens = q.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, D)
    if interleaved:
        num_blocks = num_tokens // block_size + 1
        if key_padding_mask is None:
            key_padding_mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
        q, k, v = (split_blocks(x, num_blocks).transpose(1, 2) for x in (q, k, v))  # (B, n, m, H, D)
        visible = ~split_blocks(key_padding_mask, num_blocks, fill=True).transpose(1, 2)[:, :, None]  # (B, n, 1, m)
        before = after = 0
    else:
        block_size = min(block_size, num_tokens)
        q, k, v = (split_blocks(x, block_size) for x in (q, k, v))  # (B, n, m, H, D)
        before = min(neighbors, q.shape[1] - 1)
        after = 0 if causal else before
        visible = visible_keys(key_padding_mask, num_tokens, block_size, before, after, q.device)  # (B, n, 1, L)
        k, v = (with_neighbors(x, before, after) for x in (k, v))  # (B, n, L, H, D)
    if causal:
        earlier = key_offsets(q.shape[2], before, after, q.device) <= 0  # (m, L)
        visible = both(visible, earlier[None, None])
    out = attend_in_blocks(q, k, v, visible, scale)  # (B, n, m, H, Dv)
    if interleaved:
        out = out.transpose(1, 2)
    return join_blocks(out, num_tokens).transpose(1, 2)


def check_blocks(block_size: int, neighbors: int, interleaved: bool) -> None:
    """ValueError for sizes that make no blocks, or neighbours of blocks that have none."""
    if block_size < 1 or neighbors < 0:
        raise ValueError(f"block_size must be positive and neighbors not negative, not {block_size} and {neighbors}")
    if interleaved and neighbors:
        raise ValueError("interleaved blocks have no neighbors; set neighbors to 0")


@register("local", unequal_lengths=OWN_POSITION, value_dim=True, causal=True, kind="pattern")
class LocalAttention(AttentionFunction):
    """`local_attention` as a mechanism, without parameters; its options are explained there."""

    def __init__(
        self,
        block_size: int = 64,
        neighbors: int = 0,
        interleaved: bool = False,
        scale: float | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_blocks(block_size, neighbors, interleaved)
        self.options = {"block_size": block_size, "neighbors": neighbors, "interleaved": interleaved}
        self.options |= {"scale": scale, "causal": causal}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        return local_attention(q, k, v, key_padding_mask=key_padding_mask, **self.options)
