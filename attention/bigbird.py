"""BigBird attention: blocks that see their neighbours, the first and last block, and a few random blocks.

Zaheer et al. 2020, "Big Bird: Transformers for Longer Sequences", https://arxiv.org/abs/2007.14062, section 2: softmax
attention over the out-neighbours N(i) of a graph (Eq. 1), here in the blocked form of appendix D with internal global
tokens ("ITC"): block i of the queries sees the blocks i-1, i, i+1, r random ones, and the first and the last one, whose
tokens in turn see all. Extra global tokens ("ETC") are not here. As in the authors' code every head draws its own
random blocks; here they are a function of the seed, the head, the block and the number of real blocks of the row, so
that padding changes nothing.

The Long Range Arena draws random blocks among the first 1,024 tokens only: `random_span=1024`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.blocks import OWN_POSITION, attend_in_blocks, split_blocks
from attention.dense import masked_attention
from attention.registry import AttentionFunction, check_inputs, register


def bigbird_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_size: int,
    num_random: int = 3,
    random_span: int | None = None,
    seed: int = 0,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
) -> Tensor:
    """Softmax attention over neighbouring, global and random blocks.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        block_size: tokens a block.
        num_random: random blocks that a block of queries sees; fewer where there are not so many others.
        random_span: the tokens, from the first, among which random blocks are drawn; None = all.
        seed: of the random blocks.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored. The last block is that of the last real token.

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or sizes that `check_graph` refuses.
    """
    check_inputs("bigbird", q, k, v, key_padding_mask)
    check_graph(block_size, num_random, random_span)
    heads, num_tokens = q.shape[1:3]
    block_size = min(block_size, num_tokens)
    mask = key_padding_mask
    if mask is None:
        mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    real = ~split_blocks(mask, block_size, fill=True)  # (B or 1, n, m)
    last = last_real_block(real)  # (B or 1,)
    keys, seen = key_blocks(last, heads, real.shape[1], block_size, num_random, random_span, seed)  # (B or 1, H, n, K)

    # Every head of every row is a sequence of its own from here on: G = B·H.
    rows = (q.shape[0], heads)
    q_blocks, k_blocks, v_blocks = (split_blocks(x.flatten(0, 1)[:, :, None], block_size) for x in (q, k, v))
    k_seen, v_seen = (_gather_blocks(x, keys.expand(*rows, -1, -1).flatten(0, 1)) for x in (k_blocks, v_blocks))
    visible = _gather_blocks(real[:, None].expand(-1, heads, -1, -1).flatten(0, 1), keys.flatten(0, 1))  # (.., n, K·m)
    visible = visible.unflatten(-1, (-1, block_size)) & seen.flatten(0, 1)[..., None]  # (B·H or H, n, K, m)
    visible = visible.flatten(2).unflatten(0, (-1, heads)).expand(*rows, -1, -1).flatten(0, 1)  # (G, n, K·m)
    out = attend_in_blocks(q_blocks, k_seen, v_seen, visible[:, :, None], scale)  # (G, n, m, 1, Dv)
    out = out.squeeze(3).unflatten(0, rows)  # (B, H, n, m, Dv)

    # The first and the last block see everything.
    in_last = last[:, None] * block_size + torch.arange(block_size, device=q.device)  # (B or 1, m)
    in_last = in_last.clamp_max(num_tokens - 1)[:, None, :, None].expand(*rows, -1, q.shape[-1])
    q_global = torch.cat([q[:, :, :block_size], q.gather(2, in_last)], dim=2)  # (B, H, 2m, D)
    out_global = masked_attention(q_global, k, v, ~mask[:, None, None], scale)
    block = torch.arange(out.shape[2], device=q.device)[:, None, None]  # (n, 1, 1)
    out = torch.where(block == last[:, None, None, None, None], out_global[:, :, None, block_size:], out)
    out = torch.where(block == 0, out_global[:, :, None, :block_size], out)
    return out.flatten(2, 3)[:, :, :num_tokens]


def check_graph(block_size: int, num_random: int, random_span: int | None) -> None:
    """ValueError for sizes that make no blocks."""
    if block_size < 1 or num_random < 0:
        raise ValueError(f"block_size must be positive and num_random not negative: {block_size}, {num_random}")
    if random_span is not None and random_span < block_size:
        raise ValueError(f"random_span must hold a block of {block_size} tokens, not {random_span}")


def last_real_block(real: Tensor) -> Tensor:
    """Index of the last block with a real token, 0 where there is none: bool (B, n, m) -> int64 (B,)."""
    return (real.any(dim=-1) * torch.arange(real.shape[1], device=real.device)).amax(dim=-1)


def key_blocks(
    last: Tensor, heads: int, num_blocks: int, block_size: int, num_random: int, random_span: int | None, seed: int
) -> tuple[Tensor, Tensor]:
    """The graph: which blocks of keys a block of queries sees, each of them once.

    Args:
        last: int64 (B,), the last block of each row.

    Returns:
        keys: int64 (B, H, n, K), K = 5 + num_random: first, last, the three of the window, random ones.
        seen: bool (B, H, n, K), False where a place is empty: beyond the ends, met before, or none left to draw.
    """
    last = last[:, None, None, None]  # (B, 1, 1, 1)
    block = torch.arange(num_blocks, device=last.device)[:, None]  # (n, 1)
    window = block + torch.arange(-1, 2, device=last.device)  # (n, 3)
    fixed = (torch.zeros_like(last), last, window)
    fixed_seen = (torch.ones_like(last, dtype=torch.bool), last > 0, (window > 0) & (window < last))
    keys, seen = (
        torch.cat([x.expand(last.shape[0], heads, num_blocks, -1) for x in parts], dim=-1)
        for parts in (fixed, fixed_seen)
    )  # (B, H, n, 5)
    candidates = last + 1 if random_span is None else (last + 1).clamp_max(random_span // block_size)
    nowhere = 2 * num_blocks
    taken = torch.where(seen & (keys < candidates), keys, nowhere)
    left = candidates - (taken < nowhere).sum(dim=-1, keepdim=True)  # blocks that can still be drawn
    draws = random_integers(seed, heads, num_blocks, num_random, last.device)  # (H, n, r)
    for draw in range(num_random):
        pick = draws[..., draw, None] % left.clamp_min(1)  # among those left, in order; then among all
        for other in taken.sort(dim=-1).values.split(1, dim=-1):
            pick = pick + (pick >= other)
        keys = torch.cat([keys, pick], dim=-1)
        seen = torch.cat([seen, left > 0], dim=-1)
        taken = torch.cat([taken, torch.where(left > 0, pick, nowhere)], dim=-1)
        left = left - 1
    return keys.clamp(0, num_blocks - 1), seen


def random_integers(seed: int, heads: int, num_blocks: int, num_draws: int, device: torch.device) -> Tensor:
    """Integers in [0, 2**32), (H, n, r): a hash of the seed and the place, the same for any number of blocks."""
    head, block, draw = (torch.arange(size, device=device) for size in (heads, num_blocks, num_draws))
    return _scramble(_scramble(_scramble(head + seed)[:, None, None] + block[:, None]) + draw)


def _scramble(x: Tensor) -> Tensor:
    """A mixing function of 32-bit integers in int64: multiplications and shifted exclusive ors."""
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & 0xFFFFFFFF
    return (x >> 16) ^ x


def _gather_blocks(x: Tensor, index: Tensor) -> Tensor:
    """x (G, n, m, ...) at the blocks index (G, n, K) -> (G, n, K·m, ...)."""
    first = torch.arange(x.shape[0], device=x.device)[:, None, None] * x.shape[1]
    blocks = x.flatten(0, 1).index_select(0, (index + first).flatten())  # (G·n·K, m, ...)
    return blocks.unflatten(0, index.shape).flatten(2, 3)


@register(
    "bigbird",
    unequal_lengths=OWN_POSITION,
    value_dim=True,
    causal="its global blocks see the whole sequence; the paper decodes with dense attention",
    kind="pattern",
)
class BigBirdAttention(AttentionFunction):
    """`bigbird_attention` as a mechanism, without parameters; its options are explained there."""

    def __init__(
        self,
        block_size: int = 64,
        num_random: int = 3,
        random_span: int | None = None,
        seed: int = 0,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        check_graph(block_size, num_random, random_span)
        self.options = {"block_size": block_size, "num_random": num_random, "random_span": random_span}
        self.options |= {"seed": seed, "scale": scale}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        return bigbird_attention(q, k, v, key_padding_mask=key_padding_mask, **self.options)
