"""Whether Triton kernels can run; known without importing Triton."""

from __future__ import annotations

import importlib.util
import os

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def triton_obstacle(*tensors: Tensor, max_head_dim: int, instead: str) -> str | None:
    """Why kernels cannot run on these tensors (..., head size), as the end of a sentence; None where they can.

    `instead` names the backend that takes what Triton's kernels do not.
    """
    if not HAS_TRITON:
        return "needs the package triton"
    first = tensors[0]
    if not first.is_cuda and not INTERPRETED:
        return f"needs a CUDA device, not {first.device.type} (or TRITON_INTERPRET=1 in the environment, for tests)"
    if first.is_cuda and not _is_recent(first.device):
        return f"needs a GPU of compute capability 8.0; use backend {instead!r}"
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or first.dtype not in DTYPES:
        return f"has no kernel for {', '.join(sorted(map(str, dtypes)))}; use backend {instead!r}"
    head_dim = max(x.shape[-1] for x in tensors)
    if head_dim > max_head_dim:
        return f"takes head sizes up to {max_head_dim}, not {head_dim}; use backend {instead!r}"
    return None


@torch.compiler.assume_constant_result  # torch.compile asks while it traces, instead of breaking the graph
def _is_recent(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
