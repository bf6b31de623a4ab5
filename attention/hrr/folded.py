"""The HRR self-attention layer as one function of x that forms neither queries nor keys; for CPUs.

Keys enter only through the state of each head, S = Σ_t k_t v_tᵀ = Wk G Wvᵀ with the Gram matrix G = Σ_t x_t x_tᵀ, and
queries only through what they retrieve, r = q M = x (M Wq)ᵀ: the projection by Wq and the unbinding by M (`hankel` of
β) are one linear map. That leaves v, r, the output and G, which is symmetric: 3.6 N C² multiply-adds, where q, k, v,
the output, S and q M take 4 N C² + 2 N C D, and as many tensors of x's size.

Backward, with u = (dr, dv) the gradients of r and v: dWr = drᵀ x, dWv = dvᵀ x, dx = dr Wr + dv Wv + x (dG + dGᵀ). The
sum δ over tokens that the softmax needs comes from the gradient of the output's weights, δ_h = Σ dWo ∘ Wo over the
head's columns. Kept between the passes are x, one weight for each token and head, and G; v and r are computed again,
or kept too, for up to a sixth less time and three times the memory.

It wins where sequences are long against the channels: products of C x C matrices grow with C³.

Each way is one kernel of `native`, or, where that cannot run, the steps of `folded_passes` by torch's products.

Legend: C channels of x, plus a constant 1 where the projections have a bias (it is their last column then); E = H·D
channels of q, k and v; B batch rows of N tokens. M, G, S and Wr are those of a row.
"""

from __future__ import annotations

from torch import Tensor

from attention.hrr import folded_passes as steps
from attention.hrr import native
from attention.hrr.chunked import normalize_
from attention.huge_pages import new_result


def forward(
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    key_padding_mask: Tensor | None,
    num_heads: int,
    mask_superposition: bool,
    recompute: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer without the output's bias.

    Args:
        x: (B, N, E).  wq, wk, wv: (E, C), C = E, or E + 1 with the bias as last column.  wo: (E, E).
        key_padding_mask: bool (B, N), True = ignored.
        recompute: keep neither v nor r for the backward pass.

    Returns:
        out (B, N, E), weights (B, H, N), G (B, C, C), and v and r (2, B, N, E), or (2, B, 0, E) if recomputed.
    """
    batch, tokens, dim = x.shape
    out = new_result(x, *x.shape)
    weights = x.new_empty(batch, num_heads, tokens)
    kept = new_result(x, 2, batch, 0 if recompute else tokens, dim)
    values, retrieved = (out, None) if recompute else kept
    if native.supports(x):
        gram = new_result(x, batch, wq.shape[1], wq.shape[1])
        tensors = {"x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo, "mask": key_padding_mask, "out": out, "gram": gram}
        native.run("hrr_forward", mask_superposition, weights=weights, values=values, retrieved=retrieved, **tensors)
        return out, weights, gram, kept
    gram = steps.gram(x, wq.shape[1], key_padding_mask if mask_superposition else None)  # (B, C, C)
    *_, wr = steps.retrieval(gram, wq, wk, wv, num_heads)  # (B, E, C)
    steps.retrieve(x, wv, wr, weights, values, retrieved)
    normalize_(weights, None if key_padding_mask is None else key_padding_mask[:, None], mask_superposition)
    steps.project(values, weights, wo, out)
    return out, weights, gram, kept


def backward(
    grad_out: Tensor,
    x: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    wo: Tensor,
    key_padding_mask: Tensor | None,
    weights: Tensor,
    gram: Tensor,
    kept: Tensor,
    mask_superposition: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, wq, wk, wv and wo, given that of out."""
    recompute = kept.shape[2] == 0
    grad_x = new_result(x, *x.shape)
    values, retrieved = (grad_x, None) if recompute else kept  # grad_x is written later
    if native.supports(x):
        tensors = {"x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo, "mask": key_padding_mask, "weights": weights}
        grads = [new_result(x, len(x), *weight.shape) for weight in (wq, wk, wv, wo)]
        tensors |= zip(("grad_wq", "grad_wk", "grad_wv", "grad_wo"), grads, strict=True)
        tensors |= {"grad_out": grad_out, "grad_x": grad_x, "gram": gram, "values": values, "retrieved": retrieved}
        native.run("hrr_backward", mask_superposition, **tensors)
    else:
        grad_wo, delta = steps.project_gradient(grad_out, x, wv, wo, weights, values, known=not recompute)
        keys_gram, unbinding, wr = steps.retrieval(gram, wq, wk, wv, weights.shape[1])
        grad_wr, grad_wv = steps.retrieve_gradient(grad_out, x, wv, wr, wo, weights, delta, values, retrieved, grad_x)
        *grads, grad_gram = steps.state_gradients(grad_wr, grad_wv, wq, wk, wv, gram, keys_gram, unbinding)
        steps.add_gram_gradient(x, key_padding_mask if mask_superposition else None, grad_gram, grad_x)
        grads.append(grad_wo)
    return grad_x, *(grad[0] if len(grad) == 1 else grad.sum(0) for grad in grads)
