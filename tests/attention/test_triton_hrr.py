"""The Triton backend of HRR: interpreted on a CPU, compiled for Hopper without a GPU, and run where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attention import HRRSelfAttention, hrr_attention
from attention.hrr import operators
from tests.hrr_cases import CASES, check
from tests.tolerance import assert_close

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU that is here")
KERNELS = {"bind_kernel", "compare_kernel", "weigh_kernel", "sum_gradients_kernel", "form_gradients_kernel"}


def test_kernels_in_the_interpreter():
    """In a process of its own, for the interpreter takes over where kernels are defined."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
    path = Path(__file__).with_name("interpreted_hrr_triton.py")
    result = subprocess.run([*command, path], capture_output=True, text=True, cwd=path.parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


def compile_all(monkeypatch, dtype, head_dim, masked):
    """The kernels of one forward and backward pass, compiled."""
    pytest.importorskip("triton")
    from attention.hrr.triton_passes import backward, forward
    from tests.hopper import SHARED_MEMORY, compiled_for_hopper

    q, k, v = (torch.zeros(1, 256, 4, head_dim, dtype=dtype).transpose(1, 2) for _ in range(3))
    mask = torch.zeros(1, 256, dtype=torch.bool) if masked else None
    with compiled_for_hopper(monkeypatch) as kernels:
        out, weights, bound = forward(q, k, v, mask, True)
        backward(out, weights, q, k, v, mask, weights, bound, True)
    assert {kernel.name for kernel in kernels} == KERNELS
    assert all(kernel.shared <= SHARED_MEMORY for kernel in kernels)
    return {kernel.name: kernel for kernel in kernels}


@needs_no_gpu
def test_compiles_for_hopper(monkeypatch):
    kernels = compile_all(monkeypatch, torch.bfloat16, 64, masked=False)
    for name in ("bind_kernel", "compare_kernel"):
        assert "wgmma" in kernels[name].ptx, "Hopper's own matrix instructions"
        assert "cp.async" in kernels[name].ptx, "tiles are fetched while products run"
        assert kernels[name].stack == 0, "everything is in registers"


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [8, 24, 64, 128])
def test_every_size_compiles_for_hopper(head_dim, dtype, masked, monkeypatch):
    if dtype is torch.float32 and head_dim > 64:
        pytest.skip("refused by the backend")
    kernels = compile_all(monkeypatch, dtype, head_dim, masked)
    for name in KERNELS - {"sum_gradients_kernel", "form_gradients_kernel"}:
        assert kernels[name].stack == 0, kernels[name]


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*CASES, ((2, 4, 5000, 32), True, True), ((1, 8, 3000, 128), False, True)], ids=str)
def test_equals_the_plain_expression_on_cuda(case, dtype):
    if dtype is torch.float32 and case[0][3] > 64:
        pytest.skip("refused by the backend")
    check(case, dtype, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chunks_on_cuda(dtype):
    check(CASES[1], dtype, "cuda", "chunked")


@pytest.mark.cuda
def test_is_deterministic_on_cuda():
    leaves = [torch.randn(2, 4, 20000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    runs = [torch.autograd.grad(hrr_attention(*leaves).float().square().sum(), leaves) for _ in range(2)]
    assert all(map(torch.equal, *runs))


@pytest.mark.cuda
def test_operator_on_cuda():
    leaves = [torch.randn(2, 2, 64, 16, device="cuda", requires_grad=True) for _ in range(3)]
    torch.library.opcheck(operators.attention, (*leaves, None, True, "triton"))


@pytest.mark.cuda
def test_layer_compiles_on_cuda():
    layer = HRRSelfAttention(64, 4).cuda()
    x = torch.randn(2, 300, 64, device="cuda")
    assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), 1e-4)


@pytest.mark.cuda
def test_a_million_tokens_on_cuda():
    """Memory: inputs, outputs and gradients, weights, and nothing else of their size."""
    leaves = [torch.randn(1, 4, 1 << 20, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = hrr_attention(*leaves)
    torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert torch.cuda.max_memory_allocated() - before < 5.5 * out.nbytes
