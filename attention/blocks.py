"""Sequences cut into blocks: what the mechanisms with blocks, windows and chunks share.

Legend: n blocks of m tokens, L keys that a block of queries is given. Blocks are token-major, (B, n, m, ...): for
queries that come out of a linear layer that is a view, and so is the way back.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from attention.dense import masked_attention
from attention.merging import attention_with_lse

OWN_POSITION = "a token's keys are chosen by its own position among them"  # why pattern mechanisms want equal lengths


def split_blocks(x: Tensor, block_size: int, fill: float = 0) -> Tensor:
    """(B, N, ...) -> (B, n, m, ...); the last block is filled up."""
    padding = -x.shape[1] % block_size
    if padding:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, padding), value=fill)
    return x.unflatten(1, (-1, block_size))


def join_blocks(x: Tensor, num_tokens: int) -> Tensor:
    """(B, n, m, ...) -> (B, N, ...), without what filled up the last block."""
    return x.flatten(1, 2)[:, :num_tokens]


def with_neighbors(x: Tensor, before: int, after: int, fill: float = 0) -> Tensor:
    """Every block between copies of the blocks around it: (B, n, m, ...) -> (B, n, (before + 1 + after) m, ...).

    Neighbours beyond the ends are filled.
    """
    if before == after == 0:
        return x
    num_blocks = x.shape[1]
    x = F.pad(x, (0, 0) * (x.ndim - 2) + (before, after), value=fill)
    return torch.cat([x[:, first : first + num_blocks] for first in range(before + 1 + after)], dim=2)


def key_offsets(block_size: int, before: int, after: int, device: torch.device) -> Tensor:
    """How far each key of `with_neighbors` lies behind each query of the block: position j - i, int64 (m, L)."""
    i = torch.arange(block_size, device=device)
    j = torch.arange(-before * block_size, (after + 1) * block_size, device=device)
    return j - i[:, None]


def visible_keys(
    key_padding_mask: Tensor | None,
    num_tokens: int,
    block_size: int,
    before: int,
    after: int,
    device: torch.device,
) -> Tensor | None:
    """Which keys of `with_neighbors` are real tokens: bool (B or 1, n, 1, L); None where all of them are.

    Args:
        key_padding_mask: bool (B, N), True = ignored.
    """
    if key_padding_mask is None:
        if before == after == 0 and num_tokens % block_size == 0:
            return None
        key_padding_mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=device)
    blocks = split_blocks(key_padding_mask, block_size, fill=True)  # (B, n, m)
    return ~with_neighbors(blocks, before, after, fill=True)[:, :, None]


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float | None = None) -> Tensor:
    """Softmax attention of every block's queries to the block's keys, in one batched call of torch's fused attention.

    Args:
        q: (B, n, m, H, D).  k: (B, n, L, H, D).  v: (B, n, L, H, Dv).
        visible: bool, broadcast to (B, n, m, L), True = attended to; None = all.
        scale: None means 1/sqrt(D).

    Returns:
        (B, n, m, H, Dv). A query that sees no key gets zeros.
    """
    blocks = q.shape[:2]
    q, k, v = (_rows(x) for x in (q, k, v))
    out = masked_attention(q, k, v, _mask_rows(visible, blocks), scale)
    return out.transpose(1, 2).unflatten(0, blocks)


def attend_in_blocks_with_lse(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`attention_with_lse` in every block, for `merge`.

    Args:
        q: (B, n, m, H, D).  k: (B, n, L, H, D).  v: (B, n, L, H, Dv).
        visible: bool, broadcast to (B, n, m, L), True = attended to; None = all.
        log_weights: broadcast to (B, n, m, L), as in `attention_with_lse`.

    Returns:
        out (B, n, m, H, Dv) and lse (B, n, m, H).
    """
    blocks = q.shape[:2]
    q, k, v = (_rows(x) for x in (q, k, v))
    visible, log_weights = (_mask_rows(x, blocks) for x in (visible, log_weights))
    out, lse = attention_with_lse(q, k, v, visible, scale, log_weights)
    return out.transpose(1, 2).unflatten(0, blocks), lse.transpose(1, 2).unflatten(0, blocks)


def _rows(x: Tensor) -> Tensor:
    """(B, n, m, H, D) -> (B·n, H, m, D)."""
    return x.flatten(0, 1).transpose(1, 2)


def _mask_rows(x: Tensor | None, blocks: torch.Size) -> Tensor | None:
    """What broadcasts to (B, n, m, L) -> (B·n, 1, m or 1, L), or (1, 1, m or 1, L) where all blocks have the same."""
    if x is None or x.shape[:2] == (1, 1):
        return x
    return x.expand(*blocks, -1, -1).flatten(0, 1).unsqueeze(1)


def both(visible: Tensor | None, other: Tensor) -> Tensor:
    """What is visible by two rules, the first of which may be None, for all."""
    return other if visible is None else visible & other
