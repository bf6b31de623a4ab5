"""The steps of the folded HRR layer by the kernels of `native.c`: on a CPU, in float32.

Functions as in `attention.hrr.folded_passes`. A tile of tokens goes through a whole pass in one core's cache, and a
head's matrices through all their products.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from attention.hrr import folded_passes
from attention.huge_pages import new_result
from attention.native_support import load_kernels, native_obstacle

POINTERS = (
    *("x", "grad_out", "mask", "wq", "wk", "wv", "wo", "wr", "delta", "weights", "values", "retrieved", "out"),
    *("gram", "grad_gram", "keys_gram", "unbinding", "bound_values", "grad_wq", "grad_wk", "grad_wr", "grad_wv"),
    *("grad_wo", "scratch"),
)
NUMBERS = ("rows", "tokens", "dim", "channels", "heads", "known", "threads")


class _Layer(ctypes.Structure):
    """`Layer` in native.c, field by field."""

    _fields_ = [*((name, ctypes.c_void_p) for name in POINTERS), *((name, ctypes.c_int64) for name in NUMBERS)]


def supports(x: Tensor) -> bool:
    """Whether the kernels can take such a layer."""
    return x.dtype is torch.float32 and native_obstacle("hrr", x) is None


def gram(x: Tensor, channels: int, mask: Tensor | None) -> Tensor:
    total = new_result(x, len(x), channels, channels)
    _run("hrr_gram", x, channels, x=x, mask=mask, gram=total)
    return total


def retrieval(gram: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    if not _enough_heads(gram, num_heads):
        return folded_passes.retrieval(gram, wq, wk, wv, num_heads)
    keys_gram, wr = (new_result(gram, len(gram), *wq.shape) for _ in range(2))
    unbinding = gram.new_empty(len(gram), num_heads, len(wq) // num_heads, len(wq) // num_heads)
    given = {"gram": gram, "wq": wq, "wk": wk, "wv": wv}
    _run_heads("hrr_retrieval", unbinding=unbinding, keys_gram=keys_gram, wr=wr, **given)
    return keys_gram, unbinding, wr


def retrieve(x: Tensor, wv: Tensor, wr: Tensor, weights: Tensor, values: Tensor, retrieved: Tensor | None) -> None:
    results = {"weights": weights, "values": values, "retrieved": retrieved}
    _run("hrr_retrieve", x, wv.shape[1], x=x, wv=wv, wr=wr, **results)


def project(values: Tensor, weights: Tensor, wo: Tensor, out: Tensor) -> None:
    _run("hrr_project", values, values.shape[2], values=values, weights=weights, wo=wo, out=out)


def project_gradient(
    grad_out: Tensor, x: Tensor, wv: Tensor, wo: Tensor, weights: Tensor, values: Tensor, known: bool
) -> tuple[Tensor, Tensor]:
    given = {"grad_out": grad_out, "x": x, "wv": wv, "wo": wo, "weights": weights, "values": values}
    grad_wo, delta = new_result(x, len(x), *wo.shape), x.new_empty(weights.shape[:2])
    _run("hrr_project_gradient", x, wv.shape[1], known=known, grad_wo=grad_wo, delta=delta, **given)
    return grad_wo, delta


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
    grads = {name: new_result(x, *wr.shape) for name in ("grad_wr", "grad_wv")}
    _run("hrr_retrieve_gradient", x, wv.shape[1], values=values, retrieved=retrieved, out=out, **given, **grads)
    return tuple(grads.values())


def state_gradients(
    grad_wr: Tensor,
    grad_wv: Tensor,
    wq: Tensor,
    wk: Tensor,
    wv: Tensor,
    gram: Tensor,
    keys_gram: Tensor,
    unbinding: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    given = {"grad_wr": grad_wr, "wq": wq, "wk": wk, "wv": wv, "gram": gram, "keys_gram": keys_gram}
    if not _enough_heads(gram, unbinding.shape[1]):
        return folded_passes.state_gradients(**given, grad_wv=grad_wv, unbinding=unbinding)
    bound_values, grad_wq, grad_wk = (new_result(gram, *grad_wr.shape) for _ in range(3))
    grad_gram = new_result(gram, *gram.shape)
    results = {"bound_values": bound_values, "grad_wq": grad_wq, "grad_wk": grad_wk, "grad_gram": grad_gram}
    _run_heads("hrr_state_gradients", unbinding=unbinding, grad_wv=grad_wv, **given, **results)
    return grad_wq, grad_wk, grad_wv, grad_gram


def add_gram_gradient(x: Tensor, mask: Tensor | None, grad_gram: Tensor, out: Tensor) -> None:
    _run("hrr_add_gram_gradient", x, grad_gram.shape[1], x=x, mask=mask, grad_gram=grad_gram, out=out)


def _enough_heads(gram: Tensor, num_heads: int) -> bool:
    """Whether the heads of all batch rows, each one thread's work, keep all threads busy."""
    return len(gram) * num_heads >= torch.get_num_threads()


def _run(kernel: str, tokens_of: Tensor, channels: int, known: bool = False, **tensors: Tensor | None) -> None:
    """Calls a kernel that passes over tokens (B, N, E)."""
    rows, tokens, dim = tokens_of.shape
    heads = tensors["weights"].shape[1] if "weights" in tensors else 1
    numbers = {"rows": rows, "tokens": tokens, "dim": dim, "channels": channels, "heads": heads, "known": known}
    threads = max(min(torch.get_num_threads(), rows * tokens // channels), 1)  # each has sums of C x C numbers
    _call(kernel, numbers | {"threads": threads}, tensors)


def _run_heads(kernel: str, **tensors: Tensor) -> None:
    """Calls a kernel that works on the matrices of every head."""
    rows, heads, size, _ = tensors["unbinding"].shape
    numbers = {"rows": rows, "dim": heads * size, "channels": tensors["gram"].shape[1], "heads": heads}
    _call(kernel, numbers | {"threads": torch.get_num_threads()}, tensors)


def _call(kernel: str, numbers: dict[str, int], tensors: dict[str, Tensor | None]) -> None:
    """Results among the tensors must be contiguous; the others become so."""
    kernels = load_kernels("hrr")
    kernels.hrr_scratch.restype = ctypes.c_int64
    size = kernels.hrr_scratch(*(ctypes.c_int64(numbers[name]) for name in ("channels", "threads")))
    tensors = {name: x.contiguous() for name, x in tensors.items() if x is not None}
    tensors["scratch"] = torch.empty(size, dtype=torch.float32)
    layer = _Layer(**{name: x.data_ptr() for name, x in tensors.items()}, **numbers)
    getattr(kernels, kernel)(ctypes.byref(layer))
