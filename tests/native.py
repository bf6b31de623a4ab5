"""Whether this machine can build the kernels in C."""

import pytest
import torch

from attention.native_support import native_obstacle

needs_native = pytest.mark.skipif(native_obstacle("smyrf", torch.empty(0)) is not None, reason="no kernels in C here")
native = pytest.param("native", marks=needs_native)
