"""Torch's fused block attention with its log-sum-exp, forward and backward, on a CPU and on CUDA.

`scaled_dot_product_attention` hides the log-sum-exp and insists on its own backward. Attention that merges several
softmaxes needs both in the open: the log-sum-exp to merge, and a backward that takes the output and log-sum-exp of the
whole rather than of the block. The operators below torch's function give that; their differences end in this file.

Legend: S blocks, each an independent attention of M queries to N keys. Head sizes are those of `pad_heads`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten


def supports_fused(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch has a fused kernel for this device and dtype."""
    dtypes = {"cuda": (torch.float32, torch.bfloat16, torch.float16)}
    dtypes["cpu"] = (*dtypes["cuda"], torch.float64)
    return dtype in dtypes.get(device.type, ())


def pad_heads(q: Tensor, k: Tensor, v: Tensor, masked: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Appends zeros up to the head sizes that the kernel for these tensors wants.

    They change neither the scores nor the first Dv coordinates of the output. The CPU's kernel and CUDA's flash kernel
    want q, k and v of one head size, and CUDA's kernels want multiples of 8.

    Args:
        q: (..., D).  k: (..., D).  v: (..., Dv).
        masked: whether a key mask will be given.
    """
    head_dim, value_dim = q.shape[-1], v.shape[-1]
    if q.device.type == "cpu" or _uses_cuda_flash(q, v, masked):
        head_dim = value_dim = max(head_dim, value_dim)
    if q.device.type == "cuda":
        head_dim, value_dim = (dim + -dim % 8 for dim in (head_dim, value_dim))
    return pad_head(q, head_dim), pad_head(k, head_dim), pad_head(v, value_dim)


def pad_head(x: Tensor, dim: int) -> Tensor:
    """Appends zeros to the last dimension up to `dim`; no copy where there is nothing to append."""
    return x if x.shape[-1] == dim else F.pad(x, (0, dim - x.shape[-1]))


def fused_attention(q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ) v in every block, with the log-sum-exp of its scores.

    Args:
        q: (S, M, D).  k: (S, N, D).  v: (S, N, Dv), contiguous; on CUDA, S is at most 65535.
        key_mask: bool (S, N), True = ignored.

    Returns:
        out (S, M, Dv) and lse (S, M), float32 (float64 for float64 inputs).
        A block whose keys are all masked has out 0 and lse -inf.
    """
    heads = (x.unsqueeze(1) for x in (q, k, v))  # (S, 1, M or N, D or Dv)
    out, lse = (x.squeeze(1) for x in fused_heads(*heads, _mask_to_bias(key_mask, q), scale))
    if key_mask is not None:
        # What the kernels report for a softmax over nothing differs (the CPU's says lse = 0).
        empty = key_mask.all(dim=-1)[:, None]  # (S, 1)
        out, lse = out.masked_fill_(empty[..., None], 0.0), lse.masked_fill(empty, -torch.inf)
    return out, lse


def fused_attention_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, key_mask: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the weights P = exp(scale * q kᵀ - lse).

    `out` and `lse` may belong to a softmax over more keys than the block's own: then the result is the block's share
    of the gradient of that softmax. With delta = rowsum(grad_out * out):
    dV = Pᵀ grad_out,  dS = P * (grad_out vᵀ - delta),  dQ = scale * dS k,  dK = scale * dSᵀ q
    (Dao et al. 2022, arXiv:2205.14135, appendix B). Queries with lse -inf saw no key and give zeros.

    Args:
        grad_out, out: (S, M, Dv).  lse: (S, M).  The rest as in `fused_attention`.

    Returns:
        Gradients shaped like q, k and v.
    """
    bias = _mask_to_bias(key_mask, q)
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)  # exp(s - inf) = 0, where exp(s + inf) would be no number
    heads = (x.unsqueeze(1) for x in (grad_out, q, k, v, out, lse))
    return tuple(grad.squeeze(1) for grad in fused_heads_backward(*heads, bias, scale))


def fused_heads(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale * q kᵀ + bias) v by the kernel for these tensors, with the log-sum-exp of its scores.

    Args:
        q: (S, H, M, D).  k: (S, H, N, D).  v: (S, H, N, Dv).
        bias: broadcast to (S, H, M, N), finite, in q's dtype.

    Returns:
        out (S, H, M, Dv) and lse (S, H, M), float32 (float64 for float64 inputs).
    """
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    if _uses_cuda_flash(q, v, bias is not None):
        return aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, _fit_bias(bias, q, k), True, scale=scale)[:2]
    return out, lse[..., : q.shape[2]]


def fused_heads_backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v for the weights P = exp(scale * q kᵀ + bias - lse); shapes as in `fused_heads`."""
    if q.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad_out, q, k, v, out, lse, 0.0, False, attn_mask=bias, scale=scale
        )
    if _uses_cuda_flash(q, v, bias is not None):
        no_rng = torch.zeros(2, dtype=torch.uint64, device=q.device)  # read only with dropout
        return aten._scaled_dot_product_flash_attention_backward(
            grad_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, no_rng, no_rng, scale=scale
        )
    # The kernel reads log-sum-exps in aligned runs of 32; +inf makes the surplus rows weigh nothing.
    lse = F.pad(lse, (0, -lse.shape[-1] % 32), value=torch.inf)
    no_rng = torch.zeros((), dtype=torch.int64, device=q.device)
    wanted = [True, True, True, False]
    return aten._scaled_dot_product_efficient_attention_backward(
        grad_out, q, k, v, _fit_bias(bias, q, k), out, lse, no_rng, no_rng, 0.0, wanted, scale=scale
    )[:3]


def _uses_cuda_flash(q: Tensor, v: Tensor, masked: bool) -> bool:
    """CUDA's flash kernel takes no mask and half precision only, from compute capability 8.0 on."""
    if q.device.type != "cuda" or masked or q.dtype is torch.float32 or max(q.shape[-1], v.shape[-1]) > 256:
        return False
    return torch.cuda.get_device_capability(q.device) >= (8, 0)


def _mask_to_bias(key_mask: Tensor | None, q: Tensor) -> Tensor | None:
    """Additive bias (S, 1, 1, N) in q's dtype.

    Finite, so that no kernel computes inf - inf; half the lowest number, so that adding a score cannot overflow.
    """
    if key_mask is None:
        return None
    bias = torch.zeros(key_mask.shape, dtype=q.dtype, device=q.device)
    return bias.masked_fill_(key_mask, torch.finfo(q.dtype).min / 2)[:, None, None]


def _fit_bias(bias: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """The bias in all its (S, H, M, N), expanded; CUDA's kernel reads its rows in aligned runs."""
    if bias is None:
        return None
    num_keys = k.shape[2]
    return F.pad(bias, (0, -num_keys % 16))[..., :num_keys].expand(*q.shape[:3], -1)
