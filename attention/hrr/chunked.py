"""HRR attention in chunks of tokens that stay in cache, forward and backward; for CPUs above all.

Three passes over the tokens forward: the state S = Σ k vᵀ, the exponentials of the cosines, the output. Backward, with
M the matrix that unbinds (`hankel` of β, symmetric), r = q M the vectors retrieved, w the weights and g the gradient of
the output:

    γ_t = g_t·v_t + (gradient of w_t),   δ = Σ_t w_t γ_t,   gradient of the cosine c_t = w_t (γ_t - δ),
    dr, dv from the cosine,   dv += w g,   dq = dr M,   dM = Σ q drᵀ,

and, since both M and β are linear in S, dS = N is the `hankel` of dM's anti-diagonal sums: dk = v N, dv += k N. What is
kept between the passes is the inputs, w and β: r is computed again. Nothing of the size of the inputs is allocated
besides the results (in half precision, one float32 copy of dv).

Everything is computed in float32, or in float64 for float64 inputs. Legend: a chunk has n tokens of all H heads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from attention.hrr.cosine import add_cosine_gradient, cosine
from attention.hrr.ops import hankel, sum_of_bindings

# Numbers in a chunk of q, 2 MB in float32. Half or twice of it costs the same within a few percent; far below, the
# calls cost more than they compute, far above, the chunk leaves the cache.
CHUNK = 1 << 19
DEVICE_CHUNK = 1 << 24  # on other devices only memory is at stake


def token_slices(tokens: int, channels: int, device: torch.device) -> list[slice]:
    """0 .. tokens in chunks."""
    step = max((CHUNK if device.type == "cpu" else DEVICE_CHUNK) // channels, 1)
    return [slice(start, min(start + step, tokens)) for start in range(0, tokens, step)]


def forward(
    q: Tensor, k: Tensor, v: Tensor, key_padding_mask: Tensor | None, mask_superposition: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """out (B, H, N, D), weights (B, H, N) and superposition β (B, H, D); arguments as in `hrr_attention`."""
    batch, heads, tokens, dim = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    parts = token_slices(tokens, heads * dim, q.device)
    out = torch.empty_like(v)
    weights = q.new_empty(batch, heads, tokens, dtype=dtype)
    bound = q.new_empty(batch, heads, dim, dtype=dtype)
    for b in range(batch):
        mask = None if key_padding_mask is None else key_padding_mask[b]  # (N,)
        state = q.new_zeros(heads, dim, dim, dtype=dtype)
        for t in parts:
            keys = _masked(k[b, :, t].to(dtype), mask if mask_superposition else None, t)  # (H, n, D)
            state.baddbmm_(keys.mT, v[b, :, t].to(dtype))
        bound[b] = sum_of_bindings(state)
        unbinding = hankel(bound[b])  # (H, D, D)
        for t in parts:
            values = v[b, :, t].to(dtype)
            retrieved = torch.bmm(q[b, :, t].to(dtype), unbinding, out=torch.empty_like(values))  # (H, n, D)
            torch.exp(cosine(values, retrieved), out=weights[b, :, t])
        normalize_(weights[b], None if mask is None else mask[None], mask_superposition)
        for t in parts:
            torch.mul(v[b, :, t], weights[b, :, t, None], out=out[b, :, t])
    return out, weights, bound


def backward(
    grad_out: Tensor,
    grad_weights: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_padding_mask: Tensor | None,
    weights: Tensor,
    bound: Tensor,
    mask_superposition: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given those of out (B, H, N, D) and of weights (B, H, N)."""
    batch, heads, tokens, dim = q.shape
    dtype = weights.dtype
    parts = token_slices(tokens, heads * dim, q.device)
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (q, k, v))
    for b in range(batch):
        mask = None if key_padding_mask is None or not mask_superposition else key_padding_mask[b]  # (N,)
        grad_cosine = grad_weights[b].clone()  # (H, N)
        for t in parts:
            grad_cosine[:, t] += (grad_out[b, :, t].to(dtype) * v[b, :, t]).sum(-1)
        grad_cosine -= (weights[b] * grad_cosine).sum(-1, keepdim=True)
        grad_cosine *= weights[b]
        grad_values = grad_v[b].to(dtype)  # (H, N, D), grad_v itself where the dtypes are the same
        unbinding = hankel(bound[b])  # (H, D, D)
        grad_unbinding = torch.zeros_like(unbinding)
        for t in parts:
            queries, values, dv = q[b, :, t].to(dtype), v[b, :, t].to(dtype), grad_values[:, t]  # (H, n, D)
            retrieved, dr = torch.empty_like(values), torch.empty_like(values)
            torch.bmm(queries, unbinding, out=retrieved)
            torch.mul(grad_out[b, :, t], weights[b, :, t, None], out=dv)
            add_cosine_gradient(grad_cosine[:, t], values, retrieved, dv, dr)
            grad_unbinding.baddbmm_(queries.mT, dr)
            grad_q[b, :, t] = torch.bmm(dr, unbinding, out=retrieved)
        grad_state = hankel(sum_of_bindings(grad_unbinding))  # (H, D, D)
        for t in parts:
            keys, dv = _masked(k[b, :, t].to(dtype), mask, t), grad_values[:, t]
            grad_v[b, :, t] = dv.baddbmm_(keys, grad_state)
            grad_k[b, :, t] = _masked(torch.bmm(v[b, :, t].to(dtype), grad_state), mask, t)
    return grad_q, grad_k, grad_v


def normalize_(exponentials: Tensor, mask: Tensor | None, mask_superposition: bool) -> None:
    """exp(cosine) (.., H, N) to weights, in place; mask (.., 1, N), True = ignored.

    Where all tokens are masked they get zeros, or 1/N each if masked tokens enter the superposition.
    """
    if mask is not None:
        exponentials.masked_fill_(mask, 0.0)
        if not mask_superposition:
            exponentials.masked_fill_(mask.all(-1, keepdim=True), 1.0)
    total = exponentials.sum(-1, keepdim=True)
    exponentials.div_(total.masked_fill_(total == 0, 1.0))


def _masked(x: Tensor, mask: Tensor | None, tokens: slice) -> Tensor:
    """x (H, n, D) with zeros at the masked ones of these tokens."""
    return x if mask is None else x.masked_fill(mask[tokens, None], 0.0)
