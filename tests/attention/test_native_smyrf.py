"""SMYRF's kernels in C: sizes around those of their chunks, tiles and vectors; threads; and machines that have none."""

import os
import subprocess
import sys

import pytest
import torch

from attention import clustered_attention
from attention.native_support import FLAGS, load_kernels, native_obstacle
from attention.smyrf import native
from attention.smyrf.layout import cluster_blocks
from tests.native import needs_native
from tests.reference import clustered_oracle
from tests.tolerance import assert_close

# (B, H, D, Dv), clusters, (q_cluster_size, k_cluster_size): chunks have 128 keys, tiles 6 and 48 queries
CASES = {
    "whole chunks and tiles": ((1, 2, 24, 96), 3, (96, 256)),
    "one more and one less": ((2, 1, 3, 12), 2, (49, 129)),
    "one less and one more": ((1, 1, 17, 33), 2, (47, 127)),
    "one of each": ((2, 2, 1, 1), 5, (1, 1)),
    "one cluster": ((1, 1, 40, 8), 1, (200, 700)),
    "wide": ((1, 1, 130, 70), 2, (20, 30)),
}
RULES = {
    "": {},
    "mask": {"key_padding_mask": True},
    "union": {"merge": "union"},
    "union, mask": {"merge": "union", "key_padding_mask": True},
    "causal": {"causal_mask": True, "window": 5},
    "union, causal, mask": {"merge": "union", "causal_mask": True, "window": 5, "key_padding_mask": True},
}


def differentiate(out, leaves):
    """The output with gradients of the leaves."""
    weight = torch.linspace(-1.0, 2.0, out.numel(), dtype=torch.float64).to(out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * weight).sum(), leaves)


def run(leaves, orders, sizes, **options):
    return differentiate(clustered_attention(*leaves, *orders, *sizes, **options), leaves)


def draw(case, causal=False, rounds=3):
    """Leaves in float32 and orders."""
    (batch, heads, head_dim, value_dim), clusters, (q_size, k_size) = case
    k_size = q_size if causal else k_size
    generator = torch.Generator().manual_seed(0)
    lengths = clusters * q_size, clusters * k_size
    shapes = (lengths[0], head_dim), (lengths[1], head_dim), (lengths[1], value_dim)
    leaves = [torch.randn(batch, heads, *shape, generator=generator).requires_grad_() for shape in shapes]
    orders = [torch.rand(rounds, batch, heads, n, generator=generator).argsort(-1) for n in lengths]
    return leaves, orders, (q_size, k_size)


def check(case, rules):
    """Outputs and gradients against the dense matrix in float64."""
    leaves, orders, sizes = draw(case, "causal_mask" in rules)
    options = rules | {"scale": 0.3}
    if "key_padding_mask" in rules:
        mask = torch.rand(len(leaves[1]), leaves[1].shape[2], generator=torch.Generator().manual_seed(1)) < 0.4
        mask[1:] = True  # no key left
        options["key_padding_mask"] = mask
    exact = [x.detach().double().requires_grad_() for x in leaves]
    truth = differentiate(clustered_oracle(*exact, *orders, *sizes, **options), exact)
    for ours, theirs in zip(run(leaves, orders, sizes, **options, backend="native"), truth, strict=True):
        assert_close(ours, theirs)


@needs_native
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_equals_the_dense_matrix(case, rules):
    check(case, rules)


@needs_native
@pytest.mark.parametrize("merge", ["multiset", "union"])
def test_huge_scores(merge):
    """In a union, what is left of a round may lie thousands below a score that counted in an earlier round."""
    leaves, orders, sizes = draw(((1, 2, 4, 4), 3, (8, 8)))
    out, *grads = run(leaves, orders, sizes, scale=1000.0, merge=merge, backend="native")
    exact = (x.double() for x in leaves)
    assert_close(out, clustered_oracle(*exact, *orders, *sizes, 1000.0, merge=merge), 1e-3)  # scores go to thousands
    assert all(grad.isfinite().all() for grad in grads)


@needs_native
@pytest.mark.parametrize("rules", [RULES[""], RULES["union, mask"]], ids=["plain", "union, mask"])
@pytest.mark.parametrize("lanes", [4, 8, 16])
def test_every_width_of_vectors(lanes, rules, monkeypatch):
    """Those of other processors too."""
    kernels = load_kernels("smyrf", (*FLAGS, f"-DLANES={lanes}"))
    monkeypatch.setattr(native, "load_kernels", lambda name: kernels)
    for name in ("one more and one less", "one less and one more"):
        check(CASES[name], rules)


@needs_native
def test_threads_change_nothing_but_rounding():
    before = torch.get_num_threads()
    leaves, orders, sizes = draw(CASES["one cluster"])
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(run(leaves, orders, sizes, backend="native"))
            again = run(leaves, orders, sizes, backend="native")
            assert all(torch.equal(a, b) for a, b in zip(results[-1], again, strict=True))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert_close(b, a, 1e-6)


@needs_native
@pytest.mark.parametrize("place", ["q", "k", "v"])
def test_what_is_no_number_is_not_hidden(place):
    leaves, orders, sizes = draw(CASES["one more and one less"])
    inputs = dict(zip("qkv", (x.detach().clone() for x in leaves), strict=True))
    inputs[place][0, 0, 5, 1] = torch.nan
    out = clustered_attention(*inputs.values(), *orders, *sizes, backend="native")
    assert torch.equal(out.isnan(), clustered_attention(*inputs.values(), *orders, *sizes, backend="flash").isnan())
    assert out.isnan().any()


ARRANGED = {
    "columns": lambda x: x.mT.contiguous().mT,
    "heads of a token": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every second token": lambda x: torch.stack([x, x + 1], dim=3).flatten(2, 3)[:, :, ::2],
    "part of a wider tensor": lambda x: torch.cat([x, x], dim=3)[..., : x.shape[3]],
}


@needs_native
@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("places", ["q", "kv", "qkv"])
@pytest.mark.parametrize("arrange", ARRANGED.values(), ids=ARRANGED)
def test_other_strides(arrange, places, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for name in ("one of each", "one more and one less", "whole chunks and tiles"):
            leaves, orders, sizes = draw(CASES[name])
            strided = [
                (arrange(x.detach()) if place in places else x.detach()).requires_grad_()
                for place, x in zip("qkv", leaves, strict=True)
            ]
            for a, b in zip(run(strided, orders, sizes), run(leaves, orders, sizes), strict=True):
                assert torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


@needs_native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_lie_as_their_tensors_do(dtype):
    """So that heads are split and joined without a copy; the fake operators say the same."""
    leaves, orders, sizes = draw(CASES["whole chunks and tiles"])
    leaves = [ARRANGED["heads of a token"](x.detach().to(dtype)).requires_grad_() for x in leaves]
    for x in run(leaves, orders, sizes):
        assert x.transpose(1, 2).is_contiguous()
    q_index, k_index = (cluster_blocks(order, 3) for order in orders)
    arguments = (*leaves, q_index, k_index, None, False, None, None, None, 0.3, True)
    torch.library.opcheck(torch.ops.smyrf.attend.default, arguments)


def test_refuses_what_it_cannot_do():
    leaves, orders, sizes = draw(CASES["one of each"])
    with pytest.raises(ValueError, match="native backend computes in float32, not torch.float64; use backend 'flash'"):
        clustered_attention(*(x.double() for x in leaves), *orders, *sizes, backend="native")
    assert "needs tensors on a CPU, not meta" in native_obstacle("smyrf", torch.empty(0, device="meta"))


@pytest.mark.parametrize(
    "compiler, reason",
    [("no-such-compiler", "no-such-compiler"), ("false", "false says"), ("true", "could not be built")],
)
def test_without_a_compiler(compiler, reason, tmp_path):
    """Then "auto" is "flash", and "native" says why."""
    program = """
import torch
from attention import smyrf_attention

q = torch.randn(1, 1, 32, 4)
projections = torch.randn(6, 2)
out = smyrf_attention(q, q, q, projections, 8, 8)
assert torch.equal(out, smyrf_attention(q, q, q, projections, 8, 8, backend="flash"))
try:
    smyrf_attention(q, q, q, projections, 8, 8, backend="native")
except ValueError as error:
    print(error)
"""
    environment = os.environ | {"CC": compiler, "XDG_CACHE_HOME": str(tmp_path)}
    ended = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.startswith("the native backend could not be built") and reason in ended.stdout
    assert not list(tmp_path.rglob("*.so"))


@needs_native
def test_where_nothing_can_be_kept(tmp_path):
    """Each process builds for itself, and leaves nothing."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    program = """
import torch
from attention import smyrf_attention

q = torch.randn(1, 1, 32, 4)
smyrf_attention(q, q, q, torch.randn(6, 2), 8, 8, backend="native")
"""
    folders = {"XDG_CACHE_HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path / "temporary")}
    subprocess.run([sys.executable, "-c", program], env=os.environ | folders, check=True)
    assert not list((tmp_path / "temporary").glob("smyrf-hrr-*"))
