"""The folded HRR layer by the kernels of `native.c`: on a CPU, in float32. Functions as in `attention.hrr.folded`."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.huge_pages import new_result
from attention.native_support import load_kernels, native_obstacle

POINTERS = (
    *("x", "grad_out", "mask", "wq", "wk", "wv", "wo", "out", "grad_x", "weights", "gram", "values", "retrieved"),
    *("grad_wq", "grad_wk", "grad_wv", "grad_wo", "scratch"),
)
WORK_OF_THREAD = 1 << 20  # N C² at least, or waking it costs more than it does
NUMBERS = ("rows", "tokens", "dim", "channels", "heads", "mask_superposition", "threads")


class _Layer(ctypes.Structure):
    """`Layer` in native.c, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in NUMBERS)]


def supports(x: Tensor) -> bool:
    """Whether the kernels can take such a layer."""
    return x.dtype is torch.float32 and native_obstacle("hrr", x) is None


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
    batch, tokens, dim = x.shape
    out = new_result(x, *x.shape)
    weights = x.new_empty(batch, num_heads, tokens)
    gram = new_result(x, batch, wq.shape[1], wq.shape[1])
    kept = new_result(x, 2, batch, 0 if recompute else tokens, dim)
    given = {"x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo, "mask": key_padding_mask}
    places = {"values": out} if recompute else {"values": kept[0], "retrieved": kept[1]}
    _run("hrr_forward", mask_superposition, given, weights=weights, gram=gram, out=out, **places)
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
    grad_x = new_result(x, *x.shape)
    grads = {
        f"grad_{name}": new_result(x, len(x), *w.shape) for name, w in {"wq": wq, "wk": wk, "wv": wv, "wo": wo}.items()
    }
    given = {"grad_out": grad_out, "x": x, "wq": wq, "wk": wk, "wv": wv, "wo": wo, "mask": key_padding_mask}
    places = {"values": kept[0], "retrieved": kept[1]} if kept.shape[2] else {"values": grad_x}
    _run("hrr_backward", mask_superposition, given, weights=weights, gram=gram, grad_x=grad_x, **places, **grads)
    return grad_x, *(grad[0] if len(x) == 1 else grad.sum(0) for grad in grads.values())


def _run(kernel: str, mask_superposition: bool, given: dict[str, Tensor | None], **results: Tensor) -> None:
    """Calls a kernel; results, and what an earlier one made, are contiguous."""
    kernels = load_kernels("hrr")
    tensors = {name: x.contiguous() for name, x in given.items() if x is not None} | results
    rows, tokens, dim = tensors["x"].shape
    channels, heads = tensors["wq"].shape[1], tensors["weights"].shape[1]
    threads = max(min(torch.get_num_threads(), rows * tokens * channels**2 // WORK_OF_THREAD), 1)
    layer = _Layer(**{name: x.data_ptr() for name, x in tensors.items()})
    for name, number in zip(NUMBERS, (rows, tokens, dim, channels, heads, mask_superposition, threads), strict=True):
        setattr(layer, name, number)
    kernels.hrr_scratch.restype = ctypes.c_int64
    scratch = torch.empty(kernels.hrr_scratch(ctypes.byref(layer)), dtype=torch.float32)
    layer.scratch = scratch.data_ptr()
    getattr(kernels, kernel)(ctypes.byref(layer))
