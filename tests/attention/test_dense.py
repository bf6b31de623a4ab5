"""Dense attention against its equation: odd lengths, unequal head sizes, masks."""

import pytest
import torch

from attention import DenseAttention, dense_attention
from tests.reference import visible_attention
from tests.tolerance import assert_close, assert_no_worse

SHAPES = [(2, 3, 17, 17, 8, 8), (1, 2, 33, 9, 4, 12), (2, 1, 5, 31, 12, 4), (1, 1, 7, 3, 1, 4)]


def inputs(shape, dtype=torch.float32):
    batch, heads, num_queries, num_keys, head_dim, value_dim = shape
    torch.manual_seed(0)
    sizes = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    return [torch.randn(batch, heads, *size, dtype=torch.float64).to(dtype).requires_grad_() for size in sizes]


def plain(q, k, v, scale, mask=None):
    scores = scale * q @ k.transpose(-1, -2)
    if mask is not None:
        scores = scores.masked_fill(mask[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equals_the_equation(shape, dtype):
    leaves = inputs(shape, dtype)
    out, truth = dense_attention(*leaves, scale=0.7), plain(*leaves, 0.7)
    assert_close(out, truth)
    for ours, theirs in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, truth)), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
def test_default_scale_and_mask(shape):
    q, k, v = inputs(shape)
    mask = torch.zeros(shape[0], shape[3], dtype=torch.bool)
    mask[0, 1:] = True
    assert_close(dense_attention(q, k, v, key_padding_mask=mask), plain(q, k, v, shape[4] ** -0.5, mask))


@pytest.mark.parametrize("shape", SHAPES)
def test_bfloat16_is_no_worse_than_plain(shape):
    low = inputs(shape, torch.bfloat16)
    truth = plain(*(x.double() for x in low), 1.0)
    assert_no_worse(dense_attention(*low, scale=1.0), plain(*low, 1.0), truth)


def test_gradcheck():
    mask = torch.tensor([[False, True, False], [True, True, True]])
    leaves = inputs((2, 1, 4, 3, 2, 3), torch.float64)
    assert torch.autograd.gradcheck(lambda *x: dense_attention(*x, key_padding_mask=mask), leaves)


def test_dropout_only_while_training():
    q, k, v = inputs((1, 1, 16, 16, 4, 4))
    module = DenseAttention(dropout=0.5)
    assert not torch.equal(module(q, k, v), dense_attention(q, k, v))
    assert torch.equal(module.eval()(q, k, v), dense_attention(q, k, v))


@pytest.mark.parametrize("num_tokens", [1, 13, 16])
@pytest.mark.parametrize("masked", [False, True])
def test_causal_equals_the_equation(num_tokens, masked):
    leaves = inputs((3, 2, num_tokens, num_tokens, 4, 6), torch.float64)
    mask = torch.rand(3, num_tokens, generator=torch.Generator().manual_seed(1)) < 0.4 if masked else None
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    visible = visible if mask is None else visible & ~mask[:, None, None]
    out, truth = dense_attention(*leaves, key_padding_mask=mask, causal=True), visible_attention(*leaves, visible)
    assert_close(out, truth)
    for grad, true in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, truth)), strict=True):
        assert_close(grad, true)


def test_causal_wants_as_many_keys_as_queries():
    with pytest.raises(ValueError, match="as many keys as queries, not 9 for 33"):
        dense_attention(*inputs((1, 2, 33, 9, 4, 4)), causal=True)
