"""SMYRF's operators as torch.library and torch.compile see them."""

import pytest
import torch

from attention import SmyrfAttention, SpatialAttention, smyrf_attention
from attention.smyrf.flash import _attend, _attend_backward
from tests.native import needs_native
from tests.tolerance import assert_close

RULES = {  # key_mask, union, lag, reach, max_score_bytes
    "all pairs": (None, False, None, None, None),
    "union": ("mask", True, None, None, None),
    "causal": (None, True, 2, None, 64),
    "band": ("mask", False, 0, 3, None),
}
OPTIONS = [{}, {"merge": "union"}, {"causal_mask": True, "window": 3}, {"backend": "einsum"}, {"backend": "flash"}]


@pytest.mark.parametrize("native", [False, pytest.param(True, marks=needs_native)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_operators(rules, native, dtype):
    torch.manual_seed(0)
    leaves = [torch.randn(2, 2, 32, dim, dtype=dtype, requires_grad=True) for dim in (5, 5, 7)]
    indices = [torch.rand(3, 2, 2, 32).argsort(-1).unflatten(-1, (4, -1)) for _ in "qk"]
    mask = torch.rand(2, 32) < 0.3 if rules[0] == "mask" else None
    settings = (*indices, mask, *rules[1:], 0.5, native)
    torch.library.opcheck(_attend, (*leaves, *settings))
    out, lse = _attend(*leaves, *settings)
    saved = [x.detach() for x in (*leaves, out, lse)]
    for grad_lse in (None, torch.randn_like(saved[4])):
        torch.library.opcheck(_attend_backward, (torch.randn_like(saved[3]), grad_lse, *saved, *settings))


def outputs_and_gradients(module, *inputs, **options):
    out = module(*inputs, **options)
    return out, *torch.autograd.grad(out.square().sum(), inputs)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_compiles_without_graph_breaks(options):
    torch.compiler.reset()  # it counts what it has compiled for other options
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 32, dim, requires_grad=True) for dim in (5, 5, 7)]
    projections = torch.randn(7, 3)
    module = SmyrfAttention(3, 8, 8, **options)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    eager = outputs_and_gradients(module, *inputs, projections=projections)
    for ours, theirs in zip(outputs_and_gradients(compiled, *inputs, projections=projections), eager, strict=True):
        assert_close(ours, theirs)
    assert compiled(*inputs).shape == eager[0].shape  # it draws its own projections


@pytest.mark.slow
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_inductor(options):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 2, 32, dim, requires_grad=True) for dim in (5, 5, 7)]
    projections = torch.randn(7, 3)

    def attend(q, k, v):
        return smyrf_attention(q, k, v, projections, 8, 8, **options)

    compiled = outputs_and_gradients(torch.compile(attend, fullgraph=True), *inputs)
    for ours, theirs in zip(compiled, outputs_and_gradients(attend, *inputs), strict=True):
        assert_close(ours, theirs)


def test_the_image_block_compiles():
    torch.manual_seed(0)
    module = SpatialAttention(32, "smyrf", num_hashes=2, q_cluster_size=16, k_cluster_size=4)
    torch.nn.init.ones_(module.gamma)
    module.attention.projections = torch.randn(6, 2)
    x = torch.randn(2, 32, 8, 8, requires_grad=True)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for ours, theirs in zip(outputs_and_gradients(compiled, x), outputs_and_gradients(module, x), strict=True):
        assert_close(ours, theirs)
