"""Attention in parts, merged by log-sum-exp, against one softmax over all keys; gradients of both outputs included."""

import pytest
import torch

from attention import merging
from attention.merging import attention_with_lse, merge
from tests.reference import visible_attention
from tests.tolerance import assert_close, assert_no_worse

SHAPES = [(2, 3, 7, 9, 4, 4), (1, 2, 5, 33, 4, 12), (2, 1, 16, 8, 12, 4)]


@pytest.fixture(params=["fused", "explicit"])
def path(request, monkeypatch):
    """Both ways to the same result: torch's kernel, and the scores that XLA keeps."""
    if request.param == "explicit":
        monkeypatch.setattr(merging, "supports_fused", lambda device, dtype: False)


def inputs(shape, dtype=torch.float64):
    batch, heads, num_queries, num_keys, head_dim, value_dim = shape
    generator = torch.Generator().manual_seed(0)
    sizes = ((num_queries, head_dim), (num_keys, head_dim), (num_keys, value_dim))
    return [
        torch.randn(batch, heads, *size, dtype=torch.float64, generator=generator).to(dtype).requires_grad_()
        for size in sizes
    ]


def plain(q, k, v, visible, scale, log_weights=None):
    scores = scale * q @ k.transpose(-1, -2)
    scores = scores if log_weights is None else scores + log_weights
    scores = scores if visible is None else scores.masked_fill(~visible, -torch.inf)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def assert_same(found, expected, leaves):
    """Outputs, log-sum-exps, and gradients of a function of both."""
    for ours, theirs in zip(found, expected, strict=True):
        assert_close(ours, theirs)
    loss = [(out.square().sum() + (lse * torch.linspace(-1, 1, lse.shape[-1])).sum()) for out, lse in (found, expected)]
    for ours, theirs in zip(*(torch.autograd.grad(x, leaves) for x in loss), strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("hidden", ["nothing", "keys", "pairs"])
@pytest.mark.parametrize("weighted", [False, True])
def test_equals_the_equation(shape, hidden, weighted, path):
    leaves, generator = inputs(shape), torch.Generator().manual_seed(1)
    visible = {
        "nothing": None,
        "keys": torch.rand(shape[0], 1, 1, shape[3], generator=generator) < 0.7,
        "pairs": torch.rand(1, 1, shape[2], shape[3], generator=generator) < 0.7,
    }[hidden]
    log_weights = torch.randn(shape[0], 1, 1, shape[3], generator=generator).double() if weighted else None
    found = attention_with_lse(*leaves, visible, 0.7, log_weights)
    assert_same(found, plain(*leaves, visible, 0.7, log_weights), leaves)


def test_merged_parts_are_the_whole(path):
    q, k, v = inputs((2, 3, 7, 12, 4, 6))
    visible = torch.rand(2, 1, 7, 12, generator=torch.Generator().manual_seed(1)) < 0.6
    visible[1, :, 3] = False  # a query without keys, in all parts
    visible[0, :, 2, 4:9] = False  # and one without keys in the second part
    parts = (slice(0, 4), slice(4, 9), slice(9, 12))
    out, lse = merge(*(attention_with_lse(q, k[:, :, p], v[:, :, p], visible[..., p], 0.5) for p in parts))
    expected = visible_attention(q, k, v, visible, 0.5)
    assert_close(out, expected)
    assert torch.equal(out[1, :, 3], torch.zeros_like(out[1, :, 3])) and lse.isfinite().all()
    grad = torch.randn(out.shape, dtype=out.dtype)
    ours, theirs = (torch.autograd.grad(x, (q, k, v), grad) for x in (out, expected))
    for x, y in zip(ours, theirs, strict=True):
        assert_close(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_no_worse_than_plain(dtype, path):
    leaves = inputs((2, 2, 33, 40, 8, 8), dtype)
    exact = [x.detach().double().requires_grad_() for x in leaves]
    visible = torch.rand(33, 40, generator=torch.Generator().manual_seed(1)) < 0.7
    truth, found, same = (
        f(*x, visible, 0.5) for f, x in ((plain, exact), (attention_with_lse, leaves), (plain, leaves))
    )
    assert found[0].dtype == dtype and found[1].dtype == torch.float32
    assert_no_worse(found[0], same[0], truth[0])
    grads = [
        torch.autograd.grad(out.square().sum() + lse.sum(), x)
        for (out, lse), x in zip((truth, found, same), (exact, leaves, leaves), strict=True)
    ]
    for exact_grad, ours, theirs in zip(*grads, strict=True):
        assert_no_worse(ours, theirs, exact_grad)
