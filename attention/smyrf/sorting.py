"""Orders of floating-point keys, ties by their place."""

from __future__ import annotations

from threading import Thread

import torch
from torch import Tensor

THREAD_KEYS = 1 << 16  # a thread sorts this many in several times what it takes to start


def stable_order(keys: Tensor) -> Tensor:
    """The stable argsort along the last dimension, int64; where NaNs come is not defined."""
    if keys.device.type == "cpu" and keys.dtype == torch.float32 and keys.shape[-1] < 1 << 32:
        return _order_on_cpu(keys)
    return keys.argsort(dim=-1, stable=True)


@torch.library.custom_op("smyrf::order_on_cpu", mutates_args=())
def _order_on_cpu(keys: Tensor) -> Tensor:
    """Sorts 64-bit integers: above, the key's bits as an integer that compares as the key does; below, its place.

    NumPy sorts integers by the processor's vector instructions, five to seven times as fast as torch, and lets other
    threads run. The memory is the tensor's own.
    """
    bits = (keys + 0.0).view(torch.int32)  # -0 becomes 0, to be equal to it
    bits ^= (bits >> 31) & 0x7FFFFFFF  # the bits of negative numbers but the sign grow as the numbers fall
    packed = bits.long().bitwise_left_shift_(32).bitwise_or_(torch.arange(keys.shape[-1], device=keys.device))
    rows = packed.unsqueeze(0).flatten(0, -2)
    threads = max(min(torch.get_num_threads(), len(rows), rows.numel() // THREAD_KEYS), 1)
    try:
        first, *others = (part.numpy() for part in rows.tensor_split(threads))
    except RuntimeError:  # torch without NumPy
        return packed.sort().values.bitwise_and_(0xFFFFFFFF)
    others = [Thread(target=part.sort) for part in others]
    for thread in others:
        thread.start()
    first.sort()
    for thread in others:
        thread.join()
    return packed.bitwise_and_(0xFFFFFFFF)


@_order_on_cpu.register_fake
def _(keys: Tensor) -> Tensor:
    return torch.empty_like(keys, dtype=torch.int64)
