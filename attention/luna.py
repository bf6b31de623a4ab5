"""Luna: attention through a short learned sequence, which packs the tokens and is then unpacked to each of them.

Ma et al. 2021, "Luna: Linear Unified Nested Attention", https://arxiv.org/abs/2106.01540, Eqs. 5 to 7. With a learned
sequence P (L, C)

    Y_P = Attn(P, X)          packs N tokens into L
    Y_X = Attn(X, Y_P)        unpacks them again

where Attn(A, B) = softmax(scale * A W_q (B W_k)ᵀ) B W_v has projections of its own in either place. The paper's layers
pass Y_P on as the next layer's P. A layer here is (B, N, C) -> (B, N, C) and has a P of its own.

The Long Range Arena's Luna-256 has L = 256.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attention.dense import masked_attention
from attention.fnet import SELF_ATTENTION
from attention.registry import check_tokens, register


@register(
    "luna",
    unequal_lengths=SELF_ATTENTION,
    value_dim=SELF_ATTENTION,
    causal="what it packs holds tokens of all positions; the causal form of its section 3.3 is another function",
    parameters=True,
    layer=True,
)
class LunaAttention(nn.Module):
    """Pack and unpack attention as a layer, with all of its projections.

    Args:
        dim: channels C, a multiple of `num_heads`.
        packed_length: L.
        bias: whether the projections have one.
    """

    def __init__(self, dim: int, num_heads: int, packed_length: int = 256, bias: bool = False) -> None:
        super().__init__()
        if packed_length < 1:
            raise ValueError(f"packed_length must be positive, not {packed_length}")
        self.dim, self.num_heads = dim, num_heads
        self.packed = nn.Parameter(torch.randn(packed_length, dim) * dim**-0.5)  # P
        self.pack_query, self.pack_key, self.pack_value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.unpack_query, self.unpack_key, self.unpack_value = (nn.Linear(dim, dim, bias=bias) for _ in range(3))
        self.output = nn.Linear(dim, dim, bias=bias)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, H, N, D)."""
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        check_tokens(self.name, x, self.dim, key_padding_mask)
        visible = None if key_padding_mask is None else ~key_padding_mask[:, None, None]  # (B, 1, 1, N)
        query = self._heads(self.pack_query(self.packed)[None]).expand(len(x), -1, -1, -1)  # (B, H, L, D)
        key, value = self._heads(self.pack_key(x)), self._heads(self.pack_value(x))  # (B, H, N, D)
        packed = masked_attention(query, key, value, visible).transpose(1, 2).flatten(2)  # Y_P (B, L, C)
        query = self._heads(self.unpack_query(x))  # (B, H, N, D)
        key, value = self._heads(self.unpack_key(packed)), self._heads(self.unpack_value(packed))  # (B, H, L, D)
        out = masked_attention(query, key, value, None)  # (B, H, N, D)
        return self.output(out.transpose(1, 2).flatten(2))
