"""Results in huge pages, and in memory that stays the process's own, on Linux.

Memory that is written for the first time costs an interruption for every page of 4 KB, 2 to 3 µs each in a virtual
machine: 10 ms for 16 MB, as long as a product of 16,384 x 256 by 256 x 256 takes there. In pages of 2 MB it takes 2 ms.
Memory that the C library has kept costs nothing.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes
MADV_HUGEPAGE = 14
LARGEST_KEPT = (1 << 25) - (1 << 16)  # bytes; glibc keeps no block of 32 MiB, its own header included


def new_result(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    """`like.new_empty` for what a kernel will write in full."""
    result = like.new_empty(shape, dtype=dtype)
    size = result.numel() * result.element_size()
    if size >= HUGE_PAGE and result.device.type == "cpu":
        start = -(-result.data_ptr() // HUGE_PAGE) * HUGE_PAGE
        end = (result.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
        if start < end:
            _advise()(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
    return result


@functools.cache
def keep_freed_results() -> None:
    """Has glibc keep freed results for the next ones, where nobody has set its limits (mallopt, GLIBC_TUNABLES).

    What of its heap is free at the end, it hands back to the system above twice the largest block that was freed so
    far: a layer with results of 4 MB loses them after each backward pass. This frees a block as large as counts, which
    was never written and thus never took memory; from then on 64 MB may stay.
    """
    torch.empty(LARGEST_KEPT, dtype=torch.uint8, device="cpu")


@functools.cache
def _advise() -> Callable[..., object]:
    """madvise(2), whose refusal is no error here: then pages are small, as before."""
    return ctypes.CDLL(None).madvise if sys.platform == "linux" else lambda *arguments: None
