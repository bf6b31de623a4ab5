"""The Triton kernels of SMYRF in Triton's interpreter; `test_triton_smyrf.py` runs this file in a process of its own.

Products of bfloat16 are beyond the interpreter: float16 stands for low precision here, and the tests on CUDA have both.
"""

import tests.triton_interpreter  # noqa: F401  isort: skip: before any kernel

import pytest
import torch

from attention import smyrf_attention
from attention.smyrf import triton_backend, triton_backward
from attention.smyrf.triton_backend import triton_clustered_attention
from tests.tolerance import assert_close
from tests.triton_cases import CASES, Case

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, at log2(0) and exp2(inf)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_dense_matrix(case):
    case.check(torch.float32, "cpu")


def test_low_precision_is_no_worse_than_plain():
    Case(merge="union", num_rounds=2, value_dim=48).check(torch.float16, "cpu")


def test_key_blocks_take_turns(monkeypatch):
    """With fewer slots than key blocks, later launches add to the query gradients of earlier ones."""
    monkeypatch.setattr(triton_backward, "MIN_SLOTS", 1)
    monkeypatch.setattr(triton_backward, "MIN_PROGRAMS", 0)
    Case(1, num_clusters=1, k_size=70, num_rounds=2).check(torch.float32, "cpu")


def test_is_a_backend():
    """Padding to whole clusters, and the band of a causal mask, are around the kernels."""
    torch.manual_seed(0)
    leaves = [torch.randn(1, 1, 37, size, requires_grad=True) for size in (4, 4, 6)]
    projections = torch.randn(6, 2)
    options = {"merge": "union", "causal_mask": True, "window": 1}
    results = []
    for backend in ("triton", "einsum"):
        out = smyrf_attention(*leaves, projections, 16, 16, backend=backend, **options)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    for ours, portable in zip(*results, strict=True):
        assert_close(ours, portable)


def arguments(merge):
    case = Case(1, 1, q_size=16, k_size=16, head_dim=4, value_dim=4, num_rounds=2, merge=merge)
    leaves, orders, _ = case.tensors(torch.float32)
    return *leaves, *orders, case.num_clusters, case.scale, None, case.merge


def test_compiles_without_graph_breaks():
    def outputs_and_gradients(attend):
        args = arguments("union")
        out, lse = attend(*args)
        return out, lse, *torch.autograd.grad(out.square().sum() + lse.sum(), args[:3])

    compiled = torch.compile(triton_clustered_attention, fullgraph=True, backend="aot_eager")
    pairs = zip(outputs_and_gradients(compiled), outputs_and_gradients(triton_clustered_attention), strict=True)
    assert all(torch.equal(ours, eager) for ours, eager in pairs)


@pytest.mark.parametrize("union", [False, True])
def test_operators(union):
    q, k, v, q_order, k_order, num_clusters, scale, *_ = arguments("union")
    ids = [triton_backend._cluster_ids(order, num_clusters) if union else None for order in (q_order, k_order)]
    inputs = (q, k, v, q_order, k_order, *ids, None)
    settings = (num_clusters, scale, None)
    torch.library.opcheck(triton_backend._forward, (*inputs, *settings))
    inputs = [x if x is None else x.detach() for x in inputs]
    out, lse = triton_backend._forward(*inputs, *settings)
    torch.library.opcheck(triton_backend._backward, (out, lse, *inputs, out, lse, *settings))
