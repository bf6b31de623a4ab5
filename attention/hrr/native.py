"""The passes over tokens of the folded HRR layer by the kernels of `native.c`: on a CPU, in float32.

Functions as in `attention.hrr.folded_passes`. A tile of tokens goes through a whole pass in one core's cache.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.native_support import load_kernels, native_obstacle

POINTERS = (
    *("x", "grad_out", "mask", "wv", "wo", "wr", "matrix", "delta", "weights", "values", "retrieved", "out"),
    *("gram", "grad_wr", "grad_wv", "grad_wo", "scratch"),
)
NUMBERS = ("rows", "tokens", "dim", "channels", "heads", "known", "threads")


class _Layer(ctypes.Structure):
    """`Layer` in native.c, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in NUMBERS)]


def supports(x: Tensor) -> bool:
    """Whether the kernels can take such a layer."""
    return x.dtype is torch.float32 and native_obstacle("hrr", x) is None


def gram(x: Tensor, channels: int, mask: Tensor | None) -> Tensor:
    total = x.new_empty(len(x), channels, channels)
    _run("hrr_gram", x, channels, x=x, mask=mask, gram=total)
    return total


def retrieve(x: Tensor, wv: Tensor, wr: Tensor, weights: Tensor, values: Tensor, retrieved: Tensor | None) -> None:
    results = {"weights": weights, "values": values, "retrieved": retrieved}
    _run("hrr_retrieve", x, wv.shape[1], x=x, wv=wv, wr=wr, **results)


def project(values: Tensor, weights: Tensor, wo: Tensor, out: Tensor) -> None:
    _run("hrr_project", values, values.shape[2], values=values, weights=weights, wo=wo, out=out)


def project_gradient(grad_out: Tensor, x: Tensor, wv: Tensor, weights: Tensor, values: Tensor, known: bool) -> Tensor:
    grad_wo = x.new_empty(len(x), x.shape[2], x.shape[2])
    tensors = {"grad_out": grad_out, "x": x, "wv": wv, "weights": weights, "values": values, "grad_wo": grad_wo}
    _run("hrr_project_gradient", x, wv.shape[1], known=known, **tensors)
    return grad_wo


def retrieve_gradient(
    grad_out: Tensor,
    x: Tensor,
    wv: Tensor,
    wr: Tensor,
    wo: Tensor,
    weights: Tensor,
    delta: Tensor,
    values: Tensor,
    retrieved: Tensor | None,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    given = {"grad_out": grad_out, "x": x, "wv": wv, "wr": wr, "wo": wo, "weights": weights, "delta": delta}
    grads = {name: torch.empty(wr.shape, dtype=x.dtype) for name in ("grad_wr", "grad_wv")}
    _run("hrr_retrieve_gradient", x, wv.shape[1], values=values, retrieved=retrieved, out=out, **given, **grads)
    return tuple(grads.values())


def add_product(x: Tensor, mask: Tensor | None, matrix: Tensor, out: Tensor) -> None:
    _run("hrr_add_product", x, matrix.shape[1], x=x, mask=mask, matrix=matrix, out=out)


def _run(kernel: str, tokens_of: Tensor, channels: int, known: bool = False, **tensors: Tensor | None) -> None:
    """Calls a kernel. Results among the tensors must be contiguous; the others become so."""
    rows, tokens, dim = tokens_of.shape
    kernels = load_kernels("hrr")
    threads = max(min(torch.get_num_threads(), rows * tokens // channels), 1)  # each has sums of C x C numbers
    kernels.hrr_scratch.restype = ctypes.c_int64
    size = kernels.hrr_scratch(*map(ctypes.c_int64, (dim, channels, threads)))
    tensors = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    tensors["scratch"] = torch.empty(size, dtype=torch.float32)
    numbers = {"rows": rows, "tokens": tokens, "dim": dim, "channels": channels, "known": known, "threads": threads}
    numbers["heads"] = tensors["weights"].shape[1] if "weights" in tensors else 1
    layer = _Layer(**{name: x.data_ptr() for name, x in tensors.items()}, **numbers)
    getattr(kernels, kernel)(ctypes.byref(layer))
