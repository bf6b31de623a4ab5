"""The Triton kernels of HRR in Triton's interpreter; `test_triton_hrr.py` runs this file in a process of its own.

Products of bfloat16 are beyond the interpreter: float16 stands for low precision here, and the tests on CUDA have both.
"""

import tests.triton_interpreter  # noqa: F401  isort: skip: before any kernel

import pytest
import torch
import triton.language as tl

from attention import hrr_attention
from attention.hrr import triton_passes
from tests.hrr_cases import CASES, check

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at 1 / 0 in a branch not taken


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_plain_expression(case):
    check(case, torch.float32, "cpu")


def test_low_precision_is_as_exact_as_its_rounding(monkeypatch):
    """With float32 factors split into pairs of short numbers."""
    monkeypatch.setattr(triton_passes, "SHORT_BACKWARD", {torch.float16: tl.float16})
    check(CASES[0], torch.float16, "cpu")


def test_many_workers_share_a_sequence(monkeypatch):
    monkeypatch.setattr(triton_passes, "PROGRAMS", 34)  # more than the sum over workers takes at once
    check(((1, 1, 32 * 34, 4), False, True), torch.float32, "cpu")


def test_zeros_are_finite():
    leaves = [torch.zeros(1, 1, 20, 4, requires_grad=True) for _ in range(3)]
    out = hrr_attention(*leaves, backend="triton")
    assert all(x.isfinite().all() for x in (out, *torch.autograd.grad(out.sum(), leaves)))


def test_refuses_what_it_cannot_take():
    for dtype, dim in ((torch.float64, 4), (torch.float32, 65), (torch.float16, 129)):
        with pytest.raises(ValueError, match="use backend 'chunked'"):
            hrr_attention(*[torch.zeros(1, 1, 2, dim, dtype=dtype)] * 3, backend="triton")
