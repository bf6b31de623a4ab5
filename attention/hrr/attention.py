"""HRR attention (Alam et al. 2023, arXiv:2305.19534), linear in the tokens, as a function and as a mechanism.

What it computes mixes no values between tokens: other tokens act on token t only through its scalar weight, which lies
in [e⁻²/N, e²/N].
"""

from __future__ import annotations

from torch import Tensor

from attention.hrr import operators
from attention.hrr.plain import plain_hrr_attention
from attention.hrr.triton_support import triton_obstacle
from attention.registry import AttentionFunction, check_inputs, register

BACKENDS = ("auto", "plain", "chunked", "triton")
SHORT = 1 << 17  # numbers of one sequence in q, below which the calls of a chunk cost more than one expression


def hrr_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None = None,
    return_weights: bool = False,
    mask_superposition: bool = True,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """out_t = w_t v_t with w = softmax over tokens of cosine(v_t, unbind(β, q_t)), β = Σ_t bind(k_t, v_t).

    Computes in float32 at least. The cosine of a zero vector counts as 0.

    Args:
        q, k, v: (B, H, N, D).
        key_padding_mask: bool (B, N), True = ignored: no weight, zero output.
        return_weights: also return w (B, H, N), float32 at least.
        mask_superposition: keep masked tokens out of β, so that padding changes nothing. False is the original's
            treatment: they enter β, and a row whose tokens are all masked gets the weights 1/N instead of zeros.
        backend: "plain": one expression, on any device, differentiable any number of times.  "chunked": loops over
            tokens in cache.  "triton": kernels for CUDA.  The last two keep only q, k, v and w for the backward pass,
            which is itself not differentiable.  "auto": triton or chunked on CUDA, chunked on a CPU (plain for short
            sequences), plain elsewhere.

    Returns:
        (B, H, N, D) in q's dtype.

    Raises:
        ValueError: q, k and v are not of one shape, the backend is unknown, or it cannot run on these tensors.

    Source: Alam et al. 2023, arXiv:2305.19534, Eqs. 1-4.
    """
    check_inputs("hrr", q, k, v, key_padding_mask)
    check_backend(backend)
    if backend == "auto":
        backend = _fastest_backend(q)
    if backend == "plain":
        out, weights = plain_hrr_attention(q, k, v, key_padding_mask, mask_superposition)
    else:
        if backend == "triton" and (obstacle := triton_obstacle(q)):
            raise ValueError(f"the triton backend {obstacle}")
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        out, weights, _ = operators.attention(q, k, v, key_padding_mask, mask_superposition, backend)
    return (out, weights) if return_weights else out


def check_backend(backend: str) -> None:
    """ValueError for an unknown backend."""
    if backend not in BACKENDS:
        raise ValueError(f"unknown backend {backend!r}; available: {', '.join(BACKENDS)}")


def _fastest_backend(q: Tensor) -> str:
    if q.is_cuda:
        return "chunked" if triton_obstacle(q) else "triton"
    return "chunked" if q.device.type == "cpu" and q.shape[1:].numel() >= SHORT else "plain"


@register(
    "hrr",
    unequal_lengths="a token's output is its own value, weighted",
    value_dim="binding is a convolution of vectors of one size",
    causal="the superposition and the softmax run over all tokens",
)
class HRRAttention(AttentionFunction):
    """`hrr_attention` as a mechanism, without parameters.

    Args:
        mask_superposition, backend: as in `hrr_attention`.
    """

    def __init__(self, mask_superposition: bool = True, backend: str = "auto") -> None:
        super().__init__()
        check_backend(backend)
        self.mask_superposition = mask_superposition
        self.backend = backend

    def forward(self, q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None = None) -> Tensor:
        """q, k, v (B, H, N, D), key_padding_mask bool (B, N), True = ignored -> (B, H, N, D)."""
        return hrr_attention(
            q, k, v, key_padding_mask, mask_superposition=self.mask_superposition, backend=self.backend
        )
