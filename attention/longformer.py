"""Longformer attention: a sliding window, and a few tokens that see all and are seen by all.

Beltagy et al. 2020, "Longformer: The Long-Document Transformer", https://arxiv.org/abs/2004.05150, section 3.1: every
token attends to the window of w/2 tokens on either side (Eq. 1 over these keys) and to the global tokens; the global
tokens attend to all, with projections of their own (`global_projections`). The first tokens are the global ones: for
classification the paper takes the first. Dilated windows (the paper's language model) are not here.

The Long Range Arena's window has w keys, one fewer on the left (`symmetric=False`), and no global token
(`num_global=0`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

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
from attention.dense import masked_attention
from attention.registry import AttentionFunction, check_inputs, register


def longformer_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    num_global: int = 1,
    symmetric: bool = True,
    scale: float | None = None,
    key_padding_mask: Tensor | None = None,
    causal: bool = False,
    global_qkv: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Softmax attention over a sliding window and the global tokens.

    Args:
        q, k: (B, H, N, D).  v: (B, H, N, Dv).
        window: w, at least 2; a token sees those at most w // 2 away.
        num_global: the first tokens, which see all and are seen by all.
        symmetric: False leaves out the farthest key on the left, so that an even window holds w keys.
        scale: None means 1/sqrt(D).
        key_padding_mask: bool (B, N), True = ignored.
        causal: token i sees those of its keys that come before it, and itself.
        global_qkv: other queries (B, H, num_global, D), keys and values (shaped like k and v) for the global tokens.

    Returns:
        (B, H, N, Dv). A token that sees no key gets zeros.

    Raises:
        ValueError: shapes that do not fit together, or sizes that `check_window` refuses.
    """
    check_inputs("longformer", q, k, v, key_padding_mask)
    check_window(window, num_global)
    num_tokens = q.shape[2]
    num_global = min(num_global, num_tokens)
    mask = key_padding_mask
    if mask is None and num_global:
        mask = torch.zeros(1, num_tokens, dtype=torch.bool, device=q.device)
    global_qkv = (q[:, :, :num_global], k, v) if global_qkv is None else global_qkv
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, N, H, D)

    reach, block_size = window // 2, min(window // 2, num_tokens)
    q_blocks, k_blocks, v_blocks = (split_blocks(x, block_size) for x in (q, k, v))  # (B, n, m, H, D)
    before = min(1, q_blocks.shape[1] - 1)
    after = 0 if causal else before
    offsets = key_offsets(block_size, before, after, q.device)  # (m, L)
    in_window = (offsets >= -(reach if symmetric else (window - 1) // 2)) & (offsets <= (0 if causal else reach))
    k_blocks, v_blocks = (with_neighbors(x, before, after) for x in (k_blocks, v_blocks))  # (B, n, L, H, D)
    window_mask = mask
    if num_global:  # their keys come first in every block, and not a second time in the window
        window_mask = mask | (torch.arange(num_tokens, device=q.device) < num_global)
    visible = visible_keys(window_mask, num_tokens, block_size, before, after, q.device)  # (B, n, 1, L)
    visible = both(visible, in_window[None, None])  # (B, n, m, L)
    if num_global:
        every_block = (-1, q_blocks.shape[1], -1, -1, -1)
        k_blocks = torch.cat([k[:, None, :num_global].expand(every_block), k_blocks], dim=2)  # (B, n, g + L, H, D)
        v_blocks = torch.cat([v[:, None, :num_global].expand(every_block), v_blocks], dim=2)
        see_global = ~mask[:, None, None, :num_global].expand(*visible.shape[:3], -1)
        visible = torch.cat([see_global, visible], dim=-1)
    out = attend_in_blocks(q_blocks, k_blocks, v_blocks, visible, scale)  # (B, n, m, H, Dv)
    out = join_blocks(out, num_tokens).transpose(1, 2)  # (B, H, N, Dv)
    if num_global:
        visible = ~mask[:, None, None]  # (B, 1, 1, N)
        if causal:
            visible = visible & visible.new_ones(num_global, num_tokens).tril()
        out = torch.cat([masked_attention(*global_qkv, visible, scale), out[:, :, num_global:]], dim=2)
    return out


def check_window(window: int, num_global: int) -> None:
    """ValueError for a window without neighbours or a negative number of global tokens."""
    if window < 2 or num_global < 0:
        raise ValueError(f"window must be at least 2 and num_global not negative, not {window} and {num_global}")


@register("longformer", unequal_lengths=OWN_POSITION, value_dim=True, causal=True, kind="pattern")
class LongformerAttention(AttentionFunction):
    """`longformer_attention` as a mechanism; its options are explained there.

    Args:
        global_projections: the global tokens' queries, keys and values come from three linear maps of the layer's
            input, as in the paper; for use in `MultiHeadAttention`, which fills in `dim` and `bias`. Else they share
            the projections of all tokens, and the mechanism has no parameters.

    Raises:
        ValueError: global projections without `dim`.
    """

    def __init__(
        self,
        window: int = 512,
        num_global: int = 1,
        symmetric: bool = True,
        global_projections: bool = False,
        scale: float | None = None,
        causal: bool = False,
        dim: int | None = None,
        bias: bool = False,
    ) -> None:
        super().__init__()
        check_window(window, num_global)
        self.options = {"window": window, "num_global": num_global, "symmetric": symmetric}
        self.options |= {"scale": scale, "causal": causal}
        self.takes_tokens = global_projections
        if global_projections:
            if dim is None:
                raise ValueError("global_projections need dim, the width of the layer's input")
            self.global_query = nn.Linear(dim, dim, bias=bias)
            self.global_key = nn.Linear(dim, dim, bias=bias)
            self.global_value = nn.Linear(dim, dim, bias=bias)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None, tokens: Tensor | None = None
    ) -> Tensor:
        """q, k (B, H, N, D), v (B, H, N, Dv), key_padding_mask bool (B, N), True = ignored -> (B, H, N, Dv).

        `tokens` (B, N, dim), of which q, k and v are projections: needed with `global_projections`, else refused.
        """
        if self.takes_tokens != (tokens is not None):
            raise ValueError("the tokens are needed for global projections, and for nothing else")
        global_qkv = None
        if tokens is not None:
            first = tokens[:, : self.options["num_global"]]
            projected = self.global_query(first), self.global_key(tokens), self.global_value(tokens)
            global_qkv = tuple(x.unflatten(-1, (q.shape[1], -1)).transpose(1, 2) for x in projected)
        return longformer_attention(q, k, v, key_padding_mask=key_padding_mask, global_qkv=global_qkv, **self.options)
