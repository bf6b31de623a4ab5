"""Sparse Transformer attention: two factorised patterns, of nearby tokens and of far ones, merged or one a head.

Child et al. 2019, "Generating Long Sequences with Sparse Transformers", https://arxiv.org/abs/1904.10509.
Attention over a set of keys: Eqs. 2-4. The patterns, with stride l (section 4.3; the paper's are causal):

- "strided": near = {j : |i - j| <= l},  far = {j : (i - j) mod l = 0}
- "fixed":   near = {j : floor(j / l) = floor(i / l)},  far = {j : j mod l >= l - c}, the last c tokens of every block

Heads attend to the union of both patterns ("merged", Eq. 7) or, half of them each, to one ("split", Eq. 8).

The Long Range Arena runs the setting of the paper's EnWik8 model (fixed, l = 128, c = 32, merged, causal), with the
first token of every block among the far keys too, and a first token (its CLS) outside the pattern that sees all tokens
and is seen by all, causal or not: `lra=True` is both. Without `causal` the patterns extend to later tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attention.blocks import (
    OWN_POSITION,
    attend_in_blocks,
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

PATTERNS = ("fixed", "strided")
HEADS = ("merged", "split")


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    pattern: str = "fixed",
    num_summaries: int = 32,
    heads: str = "merged",
    lra: bool = False,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """Softmax attention over nearby tokens and over far ones that stand for the rest.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        stride: l, of the order of sqrt(N).
        pattern: "fixed" or "strided".
        num_summaries: c, of the fixed pattern; below l.
        heads: "merged", or "split": the first half of the heads has the near pattern, the second half the far one.
        lra: the Long Range Arena's reading of the fixed pattern.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored.
        causal: token i sees tokens up to i.

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or options that `check_pattern` refuses.
    """
    check_inputs("sparse", q, k, v, key_padding_mask)
    check_pattern(stride, pattern, num_summaries, heads, lra)
    if heads == "split" and q.shape[1] < 2:
        raise ValueError("split heads need at least two heads")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, D)
    mask = key_padding_mask
    sets = _Fixed(stride, causal, scale, num_summaries, lra) if pattern == "fixed" else _Strided(stride, causal, scale)
    if heads == "split":
        half = q.shape[2] // 2
        near = sets.near(*(x[:, :, :half] for x in (q, k, v)), mask, without_far=False)[0]
        far = sets.far(*(x[:, :, half:] for x in (q, k, v)), mask)[0]
        out = torch.cat([near, far], dim=2)
    elif lra:
        out = _around_first_token(sets, q, k, v, mask)
    else:
        out, _ = merge(sets.near(q, k, v, mask, without_far=True), sets.far(q, k, v, mask))
    return out.transpose(1, 2)


def check_pattern(stride: int, pattern: str, num_summaries: int, heads: str, lra: bool) -> None:
    """ValueError for an unknown pattern or use of heads, or for sizes that leave a pattern without keys."""
    for value, choices in ((pattern, PATTERNS), (heads, HEADS)):
        if value not in choices:
            raise ValueError(f"unknown choice {value!r}; available: {', '.join(choices)}")
    if pattern == "fixed" and not 1 <= num_summaries < stride - lra:
        raise ValueError(f"the fixed pattern needs 1 <= num_summaries < stride, not {num_summaries} and {stride}")
    if stride < 1:
        raise ValueError(f"stride must be positive, not {stride}")
    if lra and (pattern, heads) != ("fixed", "merged"):
        raise ValueError("lra is a reading of the fixed pattern with merged heads")


@dataclass(frozen=True)
class _Fixed:
    """Key sets of the fixed pattern. q, k (B, N, H, D), v (B, N, H, Dv) -> out (B, N, H, Dv) and lse (B, N, H)."""

    stride: int
    causal: bool
    scale: float
    num_summaries: int
    first_too: bool

    def near(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, without_far: bool) -> tuple[Tensor, Tensor]:
        num_tokens = q.shape[1]
        columns = slice(int(self.first_too), self.stride - self.num_summaries) if without_far else slice(None)
        visible = visible_keys(mask, num_tokens, self.stride, 0, 0, q.device)  # (B, n, 1, l)
        if self.causal:
            visible = both(visible, key_offsets(self.stride, 0, 0, q.device)[None, None] <= 0)
        visible = None if visible is None else visible[..., columns]
        q, k, v = (split_blocks(x, self.stride) for x in (q, k, v))  # (B, n, l, H, D)
        out, lse = attend_in_blocks_with_lse(q, k[:, :, columns], v[:, :, columns], visible, self.scale)
        return join_blocks(out, num_tokens), join_blocks(lse, num_tokens)

    def far(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        num_tokens = q.shape[1]
        visible = visible_keys(mask, num_tokens, self.stride, 0, 0, q.device)  # (B, n, 1, l)
        if visible is not None:
            visible = self._summaries(visible.transpose(2, 3)).transpose(1, 2)[:, None]  # (B, 1, 1, S)
        k, v = (self._summaries(split_blocks(x, self.stride)) for x in (k, v))  # (B, S, H, D), S = c N / l
        if self.causal:
            position = split_blocks(torch.arange(num_tokens, device=q.device)[None], self.stride)  # (1, n, l)
            position = self._summaries(position)  # (1, S)
            visible = both(visible, (position <= torch.arange(num_tokens, device=q.device)[:, None])[None, None])
        out, lse = attend_in_blocks_with_lse(q[:, None], k[:, None], v[:, None], visible, self.scale)
        return out.squeeze(1), lse.squeeze(1)

    def _summaries(self, x: Tensor) -> Tensor:
        """(B, n, l, ...) -> (B, S, ...): the far keys of all blocks."""
        last = x[:, :, self.stride - self.num_summaries :]
        return (torch.cat([x[:, :, :1], last], dim=2) if self.first_too else last).flatten(1, 2)


@dataclass(frozen=True)
class _Strided:
    """Key sets of the strided pattern. Shapes as in `_Fixed`."""

    stride: int
    causal: bool
    scale: float

    def near(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, without_far: bool) -> tuple[Tensor, Tensor]:
        num_tokens = q.shape[1]
        q, k, v = (split_blocks(x, self.stride) for x in (q, k, v))  # (B, n, l, H, D)
        before = min(1, q.shape[1] - 1)
        after = 0 if self.causal else before
        offsets = key_offsets(self.stride, before, after, q.device)  # (l, L)
        window = (offsets % self.stride != 0) & (offsets.abs() < self.stride)
        if not without_far:
            window = offsets.abs() <= self.stride
        if self.causal:
            window = window & (offsets <= 0)
        visible = both(visible_keys(mask, num_tokens, self.stride, before, after, q.device), window[None, None])
        k, v = (with_neighbors(x, before, after) for x in (k, v))  # (B, n, L, H, D)
        out, lse = attend_in_blocks_with_lse(q, k, v, visible, self.scale)
        return join_blocks(out, num_tokens), join_blocks(lse, num_tokens)

    def far(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        num_tokens = q.shape[1]
        q, k, v = (split_blocks(x, self.stride).transpose(1, 2) for x in (q, k, v))  # (B, l, n, H, D)
        visible = visible_keys(mask, num_tokens, self.stride, 0, 0, q.device)  # (B, n, 1, l)
        visible = None if visible is None else visible.transpose(1, 3)  # (B, l, 1, n)
        if self.causal:
            visible = both(visible, (key_offsets(q.shape[2], 0, 0, q.device) <= 0)[None, None])
        out, lse = attend_in_blocks_with_lse(q, k, v, visible, self.scale)
        return join_blocks(out.transpose(1, 2), num_tokens), join_blocks(lse.transpose(1, 2), num_tokens)


def _around_first_token(sets: _Fixed, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """The first token attends to all and all attend to it; the pattern holds among the others."""
    visible = None if mask is None else ~mask[:, None, None]  # (B, 1, 1, N)
    first = attend_in_blocks(q[:, None, :1], k[:, None], v[:, None], visible, sets.scale).squeeze(1)  # (B, 1, H, Dv)
    if q.shape[1] == 1:
        return first
    rest = [*(x[:, 1:] for x in (q, k, v)), None if mask is None else mask[:, 1:]]
    visible = None if mask is None else visible[..., :1]
    to_first = attend_in_blocks_with_lse(q[:, None, 1:], k[:, None, :1], v[:, None, :1], visible, sets.scale)
    out, _ = merge(sets.near(*rest, without_far=True), sets.far(*rest), tuple(x.squeeze(1) for x in to_first))
    return torch.cat([first, out], dim=1)


@register("sparse", unequal_lengths=OWN_POSITION, value_dim=True, causal=True, kind="pattern", memory="N sqrt N")
class SparseAttention(AttentionFunction):
    """`sparse_attention` as a mechanism, without parameters; its options are explained there."""

    def __init__(
        self,
        stride: int = 128,
        pattern: str = "fixed",
        num_summaries: int = 32,
        heads: str = "merged",
        lra: bool = False,
        scale: float | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        check_pattern(stride, pattern, num_summaries, heads, lra)
        self.options = {"stride": stride, "pattern": pattern, "num_summaries": num_summaries, "heads": heads}
        self.options |= {"lra": lra, "scale": scale, "causal": causal}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv)."""
        return sparse_attention(q, k, v, key_padding_mask=key_padding_mask, **self.options)
