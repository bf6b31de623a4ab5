"""The Triton back-end of SMYRF: interpreted on a CPU, compiled for Hopper without a GPU, and run where there is one."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from attention.smyrf.triton_backend import supports_triton, triton_clustered_attention
from tests.tolerance import assert_close
from tests.triton_cases import CASES, Case

needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled for the GPU that is here")


def test_kernels_in_the_interpreter():
    """In a process of its own, for the interpreter takes over where kernels are defined."""
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-q", "--show-capture=no", "-p", "no:cacheprovider"]
    path = Path(__file__).with_name("interpreted_smyrf_triton.py")
    result = subprocess.run([*command, path], capture_output=True, text=True, cwd=path.parents[2])
    assert result.returncode == 0, result.stdout + result.stderr


def launch(dtype, head_dim, value_dim, merge="multiset", lag=None, masked=False, whole=True):
    """Forward and backward launches on tensors that nothing reads."""
    from attention.smyrf.triton_backend import _cluster_ids
    from attention.smyrf.triton_backward import launch_backward
    from attention.smyrf.triton_forward import launch_forward

    q_size, k_size = (1024, 256) if whole else (1000, 250)
    case = Case(1, 2, 2, q_size, k_size, head_dim, value_dim, num_rounds=2)
    (q, k, v), orders, _ = case.tensors(dtype)
    ids = [_cluster_ids(order, case.num_clusters) if merge == "union" else None for order in orders]
    mask = torch.zeros(1, k.shape[2], dtype=torch.bool) if masked else None
    tensors = (q.detach(), k.detach(), v.detach(), *orders, *ids, mask)
    out, lse = launch_forward(*tensors, case.num_clusters, 0.5, lag)
    launch_backward(out, lse, *tensors, out, lse, case.num_clusters, 0.5, lag)


def check_compiled(kernels, max_stack=0):
    """Kernels are there, fit a Hopper GPU, and some candidate of each keeps everything in registers."""
    names = {kernel.name for kernel in kernels}
    assert names == {"forward_kernel", "stats_kernel", "backward_kernel"}
    for name in names:
        candidates = [kernel for kernel in kernels if kernel.name == name]
        assert min(kernel.stack for kernel in candidates) <= max_stack, candidates
        assert min(kernel.shared for kernel in candidates) <= 227 * 1024


@needs_no_gpu
def test_compiles_for_hopper(monkeypatch):
    """One candidate of each kernel, in the sizes of the image models: 96 columns of values fit without padding."""
    pytest.importorskip("triton")
    from attention.smyrf.triton_backward import backward_kernel
    from attention.smyrf.triton_forward import forward_kernel
    from tests.hopper import compiled_for_hopper

    for kernel in (forward_kernel, backward_kernel):
        monkeypatch.setattr(kernel, "configs", kernel.configs[:1])
    with compiled_for_hopper(monkeypatch) as kernels:
        launch(torch.bfloat16, 24, 96)
    check_compiled(kernels)
    for kernel in kernels:
        if kernel.name != "stats_kernel":
            assert "wgmma" in kernel.ptx, "Hopper's own matrix instructions"
            assert "cp.async" in kernel.ptx, "rows are gathered while products run"


@needs_no_gpu
@pytest.mark.slow
@pytest.mark.parametrize("head_dim, value_dim", [(24, 96), (64, 64), (128, 128)])
@pytest.mark.parametrize(
    "options", [{}, {"merge": "union", "lag": 3, "masked": True, "whole": False}], ids=["plain", "all"]
)
@pytest.mark.parametrize("dtype, precision", [("bfloat16", "ieee"), ("float32", "ieee"), ("float32", "tf32")])
def test_every_candidate_compiles_for_hopper(dtype, precision, options, head_dim, value_dim, monkeypatch):
    pytest.importorskip("triton")
    from tests.hopper import compiled_for_hopper

    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = precision
    try:
        with compiled_for_hopper(monkeypatch) as kernels:
            launch(getattr(torch, dtype), head_dim, value_dim, **options)
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    for kernel in kernels:
        print(kernel[:4])
    check_compiled(kernels)


def test_says_what_it_cannot_do():
    (q, k, v), orders, _ = Case().tensors(torch.float32)
    assert not supports_triton(q, v)
    with pytest.raises(ValueError, match="triton|CUDA device, not cpu.*TRITON_INTERPRET"):
        triton_clustered_attention(q, k, v, *orders, 2, 1.0, None)


LARGE_CASES = {
    "image": Case(2, 1, 4, 512, 128, 24, 96, num_rounds=4),
    "narrow image, union": Case(2, 1, 4, 512, 128, 12, 48, num_rounds=4, merge="union"),
    "many key blocks": Case(1, 1, 1, 300, 900, 64, 64, num_rounds=1),
    "wide": Case(1, 2, 3, 100, 100, 128, 200, masked=True),
}
ON_CUDA = [(name, "float32") for name in (*CASES, "image")]
ON_CUDA += [(name, "bfloat16") for name in ("union", "causal union", *LARGE_CASES)]
ON_CUDA += [(name, "float16") for name in ("causal union", "image")]


def try_only(monkeypatch, number):
    """Leaves the autotuners the candidate of this number, counted again from the start where there are fewer."""
    from attention.smyrf.triton_backward import backward_kernel
    from attention.smyrf.triton_forward import forward_kernel

    for kernel in (forward_kernel, backward_kernel):
        monkeypatch.setattr(kernel, "cache", {})

        def one(configs, arguments, prune=kernel.early_config_prune, **options):
            fitted = prune(configs, arguments, **options)
            return [fitted[number % len(fitted)]]

        monkeypatch.setattr(kernel, "early_config_prune", one)


@pytest.mark.cuda
@pytest.mark.parametrize("name, dtype", ON_CUDA)
def test_kernels_on_cuda(name, dtype, monkeypatch):
    try_only(monkeypatch, 0)
    (CASES | LARGE_CASES)[name].check(getattr(torch, dtype), "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("number", range(5))
def test_every_candidate_on_cuda(number, monkeypatch):
    try_only(monkeypatch, number)
    LARGE_CASES["image"].check(torch.bfloat16, "cuda")


@pytest.mark.cuda
def test_tuning_on_cuda():
    """The autotuner runs candidates on the real tensors, and must leave the result of one run."""
    LARGE_CASES["image"].check(torch.bfloat16, "cuda")


@pytest.mark.cuda
def test_key_blocks_take_turns_on_cuda(monkeypatch):
    from attention.smyrf import triton_backward

    monkeypatch.setattr(triton_backward, "MIN_SLOTS", 3)
    monkeypatch.setattr(triton_backward, "MIN_PROGRAMS", 0)
    LARGE_CASES["many key blocks"].check(torch.float32, "cuda")


@pytest.mark.cuda
@pytest.mark.parametrize("merge", ["multiset", "union"])
def test_runs_repeat_bit_for_bit(merge):
    case = LARGE_CASES["image"]
    leaves, orders, _ = case.tensors(torch.bfloat16)
    leaves, orders = ([x.detach().cuda() for x in group] for group in (leaves, orders))

    def run():
        inputs = [x.requires_grad_() for x in leaves]
        out, lse = triton_clustered_attention(*inputs, *orders, case.num_clusters, case.scale, None, merge)
        return out, lse, *torch.autograd.grad(out.float().square().sum(), inputs)

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


@pytest.mark.cuda
def test_a_million_queries():
    """Offsets beyond 32 bits: 8 heads, 1,048,576 queries, 262,144 keys; two clusters against attention of their own."""
    num_heads, num_clusters, q_size, k_size, head_dim, value_dim = 8, 1024, 1024, 256, 64, 256
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(length, size):
        shape = (1, num_heads, num_clusters * length, size)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, generator=generator)

    leaves = [draw(q_size, head_dim), draw(k_size, head_dim), draw(k_size, value_dim)]
    grad_out = draw(q_size, value_dim)
    assert grad_out.numel() >= 2**31
    # The last cluster holds the first tokens.
    orders = [torch.arange(x.shape[2], device="cuda").flip(0).expand(1, 1, num_heads, -1) for x in leaves[:2]]
    leaves = [x.requires_grad_() for x in leaves]
    out, lse = triton_clustered_attention(*leaves, *orders, num_clusters, 0.1, None)
    results = (out, lse, *torch.autograd.grad(out, leaves, grad_out))
    for cluster in (0, num_clusters - 1):
        rows, columns = (slice(cluster * size, (cluster + 1) * size) for size in (q_size, k_size))
        places = (rows, columns, columns)
        q, k, v = (x[0, -1, place].detach().double().requires_grad_() for x, place in zip(leaves, places, strict=True))
        scores = 0.1 * q @ k.T
        truth = scores.softmax(-1) @ v
        truths = (truth, scores.logsumexp(-1), *torch.autograd.grad(truth, (q, k, v), grad_out[0, -1, rows].double()))
        for value, true_value, place in zip(results, truths, (rows, rows, *places), strict=True):
            assert_close(value[0, -1, place], true_value, 2e-2)


@pytest.mark.cuda
def test_compiles_on_cuda_without_graph_breaks():
    case = LARGE_CASES["image"]
    leaves, orders, _ = case.tensors(torch.bfloat16)
    leaves, orders = ([x.detach().cuda() for x in group] for group in (leaves, orders))
    compiled = torch.compile(triton_clustered_attention, fullgraph=True)
    results = []
    for attend in (compiled, triton_clustered_attention):
        inputs = [x.requires_grad_() for x in leaves]
        out, _ = attend(*inputs, *orders, case.num_clusters, case.scale, None)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), inputs)))
    for ours, eager in zip(*results, strict=True):
        assert torch.equal(ours, eager)
