"""The self-attention layer of Hrrformer (Alam et al. 2023, arXiv:2305.19534)."""

from __future__ import annotations

import torch
from torch import Tensor

from attention.hrr import native, operators
from attention.multi_head import MultiHeadAttention
from attention.registry import check_tokens

FOLDING_PAYS = 4  # from so many times as many tokens as channels on
NATIVE_FOLDING_PAYS = 1.5  # by the kernels in C


class HRRSelfAttention(MultiHeadAttention):
    """HRR self-attention, (B, N, C) -> (B, N, C); its parameters are those of `MultiHeadAttention`.

    On a CPU, in full precision, and on sequences long against C it is one function of x that forms no queries and no
    keys (`attention.hrr.folded`); hooks of the projections do not run then. Elsewhere it is `MultiHeadAttention`.

    Args:
        dim: channels C, a multiple of `num_heads`.
        bias: whether the four projections have one.
        mask_superposition, backend: as in `hrr_attention`; with a backend other than "auto" nothing is folded.
        recompute: where folded, keep x alone for the backward pass; False keeps two more tensors of its size, and
            takes up to a sixth less time.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        bias: bool = False,
        mask_superposition: bool = True,
        backend: str = "auto",
        recompute: bool = True,
    ) -> None:
        super().__init__(dim, num_heads, "hrr", bias, mask_superposition=mask_superposition, backend=backend)
        self.recompute = recompute

    def forward(self, x: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """x (B, N, C), key_padding_mask bool (B, N), True = ignored -> (B, N, C)."""
        dim = self.output.out_features
        check_tokens("hrr", x, dim, key_padding_mask)
        if not self._folds(x):
            return super().forward(x, key_padding_mask)
        projections = (self.query, self.key, self.value)
        wq, wk, wv = (
            p.weight if p.bias is None else torch.cat([p.weight, p.bias[:, None]], dim=1) for p in projections
        )
        keep = torch.is_grad_enabled() and not self.recompute
        options = (self.num_heads, self.attention.mask_superposition, not keep)
        out = operators.layer(x, wq, wk, wv, self.output.weight, key_padding_mask, *options)[0]
        return out if self.output.bias is None else out + self.output.bias

    def _folds(self, x: Tensor) -> bool:
        if self.attention.backend != "auto" or x.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
            return False
        full_precision = x.dtype == self.output.weight.dtype and x.dtype in (torch.float32, torch.float64)
        tokens, dim = x.shape[1:]
        pays = tokens >= FOLDING_PAYS * dim or tokens >= NATIVE_FOLDING_PAYS * dim and native.supports(x)
        return full_precision and pays
