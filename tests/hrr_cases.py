"""What every backend of HRR attention must compute: shapes and masks, against the plain expression in float64."""

from __future__ import annotations

import torch

from attention import hrr_attention
from tests.tolerance import assert_close

Case = tuple[tuple[int, int, int, int], bool, bool]  # (B, H, N, D), masked, mask_superposition

CASES: list[Case] = [
    ((2, 2, 100, 16), False, True),
    ((2, 1, 70, 15), True, True),
    ((2, 1, 70, 15), True, False),
    ((1, 1, 3, 2), False, True),
    ((1, 1, 65, 64), False, True),
]


def check(case: Case, dtype: torch.dtype, device: str, backend: str = "triton") -> None:
    """Outputs, weights and gradients, the last row with all tokens masked; q, k and v as a projection leaves them."""
    (batch, heads, tokens, dim), masked, mask_superposition = case
    torch.manual_seed(0)
    leaves = [torch.randn(batch, tokens, heads, dim).to(device, dtype).transpose(1, 2) for _ in range(3)]
    mask = None
    if masked:
        mask = torch.rand(batch, tokens) < 0.4
        mask[-1] = True
        mask = mask.to(device)
    directions = [
        torch.randn(batch, heads, tokens, dim).to(device, dtype),
        torch.randn(batch, heads, tokens).to(device),
    ]

    def run(leaves: list[torch.Tensor], backend: str) -> list[torch.Tensor]:
        leaves = [x.detach().requires_grad_() for x in leaves]
        results = hrr_attention(
            *leaves, mask, return_weights=True, mask_superposition=mask_superposition, backend=backend
        )
        grads = torch.autograd.grad(results, leaves, [d.to(r) for d, r in zip(directions, results, strict=True)])
        return [*results, *grads]

    ours = run(leaves, backend)
    truth = run([x.double() for x in leaves], "plain")
    tolerance = None if dtype is torch.float32 else 2 * torch.finfo(dtype).eps  # results are rounded once
    for x, y in zip(ours, truth, strict=True):
        assert_close(x.float(), y, tolerance)
