"""The chunked loops of HRR attention against the plain expression, and as operators of torch."""

import pytest
import torch

from attention import hrr_attention
from attention.hrr import chunked, operators
from tests.tolerance import assert_close

CHUNKS = [1, 60, 1 << 19]  # numbers: one token at a time, a few, all


def inputs(shape, dtype=torch.float64, token_major=True):
    """q, k, v as a projection leaves them, (B, N, H, D) in memory, or as one would write them down."""
    torch.manual_seed(0)
    batch, heads, tokens, dim = shape
    if token_major:
        x = [torch.randn(batch, tokens, heads, dim, dtype=dtype).transpose(1, 2) for _ in range(3)]
    else:
        x = [torch.randn(shape, dtype=dtype) for _ in range(3)]
    return [y.requires_grad_() for y in x]


def random_mask(batch, tokens):
    mask = torch.rand(batch, tokens) < 0.4
    mask[-1] = True  # every token of the last row
    return mask


def run(leaves, mask, mask_superposition, backend):
    """Outputs, weights, and gradients of a random projection of both."""
    options = {"return_weights": True, "mask_superposition": mask_superposition, "backend": backend}
    results = hrr_attention(*leaves, mask, **options)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, dtype=x.dtype, generator=generator) for x in results]
    return *results, *torch.autograd.grad(results, leaves, directions)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mask_superposition", [False, True])
@pytest.mark.parametrize("token_major", [False, True])
def test_equals_autograd_through_the_plain_expression(chunk, masked, mask_superposition, token_major, monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", chunk)
    leaves = inputs((3, 2, 23, 5), token_major=token_major)
    mask = random_mask(3, 23) if masked else None
    ours = run(leaves, mask, mask_superposition, "chunked")
    plain = run(leaves, mask, mask_superposition, "plain")
    for x, y in zip(ours, plain, strict=True):
        assert_close(x, y)
    assert all(x.stride() == leaves[0].stride() for x in (ours[0], *ours[2:])), "results are laid out as the inputs"


def test_float32_over_many_chunks_is_as_exact_as_one_expression(monkeypatch):
    monkeypatch.setattr(chunked, "CHUNK", 1000)
    leaves = inputs((1, 2, 3000, 8), torch.float32)
    for x, y in zip(run(leaves, None, True, "chunked"), run(leaves, None, True, "plain"), strict=True):
        assert_close(x, y)


def test_keeps_the_inputs_and_one_weight_for_each_token():
    leaves = inputs((2, 2, 300, 8), torch.float32)
    kept = {}

    def remember(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda x: x):
        hrr_attention(*leaves, backend="chunked")
    assert sum(kept.values()) == 3 * leaves[0].numel() + 2 * 2 * 300 + 2 * 2 * 8


def test_short_sequences_are_one_expression_and_long_ones_chunks():
    assert hrr_attention(*inputs((1, 1, 8, 4))).grad_fn.name() != "GeneratedBackwardFor_hrr_attention_defaultBackward"
    long = hrr_attention(*inputs((1, 2, 8192, 8), torch.float32))
    assert long.grad_fn.name() == "GeneratedBackwardFor_hrr_attention_defaultBackward"


@pytest.mark.parametrize("dtype, masked", [(torch.float32, True), (torch.bfloat16, False)])
def test_operator_is_well_formed(dtype, masked):
    leaves = inputs((2, 2, 6, 4), dtype)
    mask = random_mask(2, 6) if masked else None
    torch.library.opcheck(operators.attention, (*leaves, mask, True, "chunked"))


@pytest.mark.parametrize("backend", ["plain", "chunked"])
def test_compiles_without_graph_breaks(backend):
    compiled = torch.compile(hrr_attention, fullgraph=True, backend="aot_eager")
    leaves = inputs((2, 2, 40, 8))
    mask = random_mask(2, 40)
    outs = [f(*leaves, mask, backend=backend) for f in (compiled, hrr_attention)]
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in outs]
    assert_close(*outs)
    for x, y in zip(*grads, strict=True):
        assert_close(x, y)


@pytest.mark.slow
def test_compiles_with_inductor():
    compiled = torch.compile(hrr_attention, fullgraph=True)
    leaves = inputs((1, 2, 8192, 8), torch.float32)
    outs = [f(*leaves) for f in (compiled, hrr_attention)]
    assert_close(*outs)
    for x, y in zip(*(torch.autograd.grad(out.square().sum(), leaves) for out in outs), strict=True):
        assert_close(x, y)
