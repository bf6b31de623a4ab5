"""What the tests of attention mechanisms share: small options, inputs, masks, and the comparison with a twin."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.tolerance import assert_close

# Sized for sequences of some ten tokens: those that cut them into blocks, windows or clusters get several of them.
OPTIONS = {
    "bigbird": {"block_size": 2, "num_random": 1},
    "dense": {},
    "fnet": {},
    "h-transformer-1d": {"block_size": 2},
    "hrr": {},
    "linear": {},
    "linformer": {"rank": 4},
    "local": {"block_size": 4},
    "longformer": {"window": 4},
    "luna": {"packed_length": 4},
    "nystromformer": {"num_landmarks": 4, "conv_size": 3},
    "performer": {"num_features": 8},
    "reformer": {"num_hashes": 2, "num_buckets": 4, "chunk_size": 4},
    "sinkhorn": {"block_size": 4},
    "smyrf": {"num_hashes": 2, "q_cluster_size": 4, "k_cluster_size": 4},
    "sparse": {"stride": 4, "num_summaries": 1},
    "synthesizer": {},
}


def make_qkv(batch: int, heads: int, num_tokens: int, head_dim: int, value_dim: int, seed: int = 0) -> list[Tensor]:
    """Gaussian leaves q, k (B, H, N, D) and v (B, H, N, Dv) in float64."""
    generator = torch.Generator().manual_seed(seed)
    dims = (head_dim, head_dim, value_dim)
    shape = (batch, heads, num_tokens)
    return [torch.randn(*shape, dim, dtype=torch.float64, generator=generator).requires_grad_() for dim in dims]


def make_mask(kind: str, batch: int, num_tokens: int) -> Tensor | None:
    """A key_padding_mask (B, N): None for "none"; "padding" at the end of every other row; "holes" anywhere.

    The last row of "holes" has no token left.
    """
    if kind == "none":
        return None
    if kind == "padding":
        lengths = torch.tensor([num_tokens if row % 2 else max(2 * num_tokens // 3, 1) for row in range(batch)])
        return torch.arange(num_tokens) >= lengths[:, None]
    mask = torch.rand(batch, num_tokens, generator=torch.Generator().manual_seed(1)) < 0.4
    mask[-1] = True
    return mask


def assert_equals_twin(
    attend: Callable[..., Tensor], twin: Callable[..., Tensor], leaves: list[Tensor], mask: Tensor | None
) -> None:
    """Outputs and gradients of attend(q, k, v, mask) and twin(q, k, v, mask) agree.

    Outputs of masked tokens are left out: no mechanism promises them.
    """
    hidden = torch.zeros(leaves[0].shape[0], leaves[0].shape[2], dtype=torch.bool) if mask is None else mask
    generator = torch.Generator().manual_seed(2)
    found, expected = (f(*leaves, mask).masked_fill(hidden[:, None, :, None], 0.0) for f in (attend, twin))
    assert_close(found, expected)
    grad = torch.randn(found.shape, dtype=found.dtype, generator=generator)
    for ours, theirs in zip(*(torch.autograd.grad(out, leaves, grad) for out in (found, expected)), strict=True):
        assert_close(ours, theirs)
