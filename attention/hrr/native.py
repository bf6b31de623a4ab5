"""The kernels of `native.c`, the folded HRR layer on a CPU in float32; `attention.hrr.folded` calls them."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.huge_pages import keep_freed_results
from attention.native_support import load_kernels, native_obstacle, scratch_memory

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


def run(kernel: str, mask_superposition: bool, **tensors: Tensor | None) -> None:
    """Calls a kernel on tensors of `Layer` in native.c. Results among them must be contiguous; the others become so."""
    kernels = load_kernels("hrr")
    keep_freed_results()
    tensors = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    rows, tokens, dim = tensors["x"].shape
    channels, heads = tensors["wq"].shape[1], tensors["weights"].shape[1]
    threads = max(min(torch.get_num_threads(), rows * tokens * channels**2 // WORK_OF_THREAD), 1)
    numbers = zip(NUMBERS, (rows, tokens, dim, channels, heads, mask_superposition, threads), strict=True)
    layer = _Layer(**{name: x.data_ptr() for name, x in tensors.items()}, **dict(numbers))
    kernels.hrr_scratch.restype = ctypes.c_int64
    scratch = scratch_memory(kernels.hrr_scratch(ctypes.byref(layer)))
    layer.scratch = scratch.data_ptr()
    getattr(kernels, kernel)(ctypes.byref(layer))
