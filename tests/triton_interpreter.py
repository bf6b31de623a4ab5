"""Triton's interpreter, for tests of kernels on a CPU; to be imported before any kernel, in a process of its own.

Triton reads TRITON_INTERPRET when a kernel is defined, so a process has either interpreted or compiled kernels.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

from triton.runtime import interpreter  # noqa: E402

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_with_loop_bounds(tensor: type) -> None:
    """Triton 3.5 makes loop bounds of arrays of one element by int(), which numpy 2.4 refuses."""
    _patch_tensor(tensor)
    tensor.__index__ = lambda self: int(self.handle.data.item())


interpreter._patch_lang_tensor = _patch_tensor_with_loop_bounds
