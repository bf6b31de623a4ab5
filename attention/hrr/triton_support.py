"""Whether the Triton kernels of HRR attention can run; known without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
# The backward kernels hold two matrices of D x D on chip, with all that their products need.
MAX_HEAD_DIM = {torch.float32: 64, torch.bfloat16: 128, torch.float16: 128}
LARGE_SHARED_MEMORY = 160_000  # of GPUs for data centres; others have what half the head sizes take


def triton_obstacle(q: Tensor) -> str | None:
    """Why the kernels cannot run on tensors like q; None where they can."""
    if not HAS_TRITON:
        return "needs the package triton"
    if not q.is_cuda and not INTERPRETED:
        return f"needs a CUDA device, not {q.device.type} (or TRITON_INTERPRET=1 in the environment, for tests)"
    if q.dtype not in MAX_HEAD_DIM:
        return f"has no kernel for {q.dtype}; use backend 'chunked'"
    if q.shape[-1] > MAX_HEAD_DIM[q.dtype]:
        return f"takes head sizes up to {MAX_HEAD_DIM[q.dtype]} in {q.dtype}, not {q.shape[-1]}; use backend 'chunked'"
    if q.is_cuda and 2 * q.shape[-1] > MAX_HEAD_DIM[q.dtype]:
        room = _shared_memory(q.device.index)
        if room < LARGE_SHARED_MEMORY:
            return f"needs {LARGE_SHARED_MEMORY} bytes of shared memory for this head size, not {room}"
    return None


@torch.compiler.assume_constant_result  # so that a caller compiles in one graph
def _shared_memory(device: int) -> int:
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
